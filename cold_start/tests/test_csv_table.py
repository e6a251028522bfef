"""The strict CSV reader: whatever is wrong with a file is one message with file, row or line, and remedy."""

import pytest

from descore.csv_table import CsvError, CsvTable, parse_two_paths, parse_two_seconds


def read(path, content: bytes) -> list[dict[str, str]]:
    path.write_bytes(content)
    table = CsvTable(path)
    rows = [row.cells for row in table.rows()]
    table.require_clean()
    return rows


def test_cells_come_as_written_and_blank_lines_are_skipped(tmp_path):
    content = b'\xef\xbb\xbfa,b\n\n"1,""2""\nx", 3\n4,\n'
    assert read(tmp_path / "t.csv", content) == [{"a": '1,"2"\nx', "b": " 3"}, {"a": "4", "b": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"a,b\n", "there are no rows"),
        (b"a,b,a\n1,2,3\n", r"column\(s\) a "),
        (b"x" * 10_000 + b",a," + b"x" * 10_000, r"column\(s\) x+\.\.\. "),
        (b"a,b\n1,2\n3\n", r"row 2 \(line 3\): it has 1 cells where the header line has 2"),
        (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: the CSV cannot be read from here on"),
        (b'a,b\n1,2\n"3"x,4\n', "line 3: the CSV cannot be read from here on"),
        (b"a,b\n1,\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"a,b\n1,\0\n", "line 2: byte 0x00 is not UTF-8"),
        (b"\x1f\x8b\x08rest", "line 1: byte 0x8b is not UTF-8"),
        (b"a,b\n1," + b"x" * 200_000 + b"\n", "line 2: the CSV cannot be read from here on: field larger"),
    ],
    ids=lambda value: None,
)
def test_unusable_files_are_one_message(tmp_path, content, message):
    path = tmp_path / "table.csv"
    with pytest.raises(CsvError, match=message) as caught:
        read(path, content)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_missing_file_and_columns_are_named(tmp_path):
    with pytest.raises(CsvError, match="file not found"):
        CsvTable(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(CsvError, match=r"column c is missing; .*the file has a, b"):
        CsvTable(tmp_path / "t.csv").require(["a", "c"])


HOSTILE_LISTS = ["{[]: 1}", "-" * 3000 + "1", "[" * 5000, "[1, 2, 3]", "", "['a'", "[1] * 2", "x" * 10**6]
NO_PATHS = ["[1, 2]", "['a', '']", "['a\\0', 'b']", "[['a'], 'b']", f"['{'a' * 5000}', 'b']"]
NO_SECONDS = ["[-1, 2]", "[1e999, 2]", "['nan', 2]", f"[{10**400}, 1]", f"[{'9' * 5000}, 1]", "[None, 2]"]


@pytest.mark.parametrize(
    ("parse", "texts"), [(parse_two_paths, HOSTILE_LISTS + NO_PATHS), (parse_two_seconds, HOSTILE_LISTS + NO_SECONDS)]
)
def test_what_is_not_a_list_of_two_is_one_short_message(parse, texts):
    for text in texts:
        with pytest.raises(ValueError, match=r"^cell is .*; write") as caught:
            parse(text, "cell")
        assert len(str(caught.value)) < 300


def test_lists_are_read():
    assert parse_two_paths(" ['a.mp4', \"b.mp4\"] ", "videos") == ("a.mp4", "b.mp4")
    assert parse_two_seconds("(1, 2.5)", "durations") == (1.0, 2.5)
