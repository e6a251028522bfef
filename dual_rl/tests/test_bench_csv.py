"""Reading benchmark CSVs: every format, what rows share, and faults that name row, line and remedy."""

import re
from pathlib import Path
from typing import get_args

import pytest

from make_toy_world import sample_example
from scoring.bench_csv import BenchType, compute_item_id, read_bench
from scoring.types import VideoTask
from toy_world.tables import build_tables, write_table
from toy_world.world import WorldConfig
from verl.data.pair_csv import CsvError
from verl.data.scored_sequence import judge_problem

PAIRS = sample_example(WorldConfig())
LABELS = {"A": 1, "B": -1, "same": 0, "invalid": None, "leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0}
PATHS, PROMPT = {"path_A": "a.mp4", "path_B": "b.mp4"}, {"prompt": "a red circle"}
TABENCH = {"video_A": "a.mp4", "video_B": "b.mp4", **PROMPT, "answer": "A"}
GOOD = {  # the label comes last
    "tabench": TABENCH,
    "videoalign": {**PATHS, **PROMPT, "Overall": "A"},
    "genai": {"left_video_path": "a.mp4", "right_video_path": "b.mp4", **PROMPT, "vote_type": "A"},
    "react": {**PATHS, **PROMPT, "GSB_overall": "A"},
    "videofeedback": {"video_path": "a.mp4", **PROMPT},
}
PAIRED = [bench_type for bench_type in GOOD if bench_type != "videofeedback"]


def write_bench(folder: Path, content: list[dict] | bytes, *, videos=("a.mp4", "b.mp4")) -> Path:
    """bench.csv of rows, or of these very bytes, beside empty videos."""
    for file in (path := folder / "bench.csv", *(folder / video for video in videos)):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    path.write_bytes(content) if isinstance(content, bytes) else write_table(path, content)
    return path


@pytest.mark.parametrize("bench_type", get_args(BenchType))
def test_rows_of_every_format_find_their_videos_prompts_labels_and_models(tmp_path, bench_type):
    table = build_tables({"eval": PAIRS}, judge_problem)[f"bench_{bench_type}.csv"]
    path = write_bench(tmp_path, table, videos=[f"videos/{clip.name}" for pair in PAIRS for clip in pair.clips])
    bench, is_paired = read_bench(path, bench_type), bench_type in PAIRED
    assert (bench.path, bench.bench_type, bench.is_paired) == (str(path), bench_type, is_paired)
    assert (len(bench.items), bench.missing, bench.num_duplicate_rows) == (2 * len(PAIRS), {}, 0)
    known = re.compile("answer|VQ|MQ|TA|Overall|vote_type|GSB_.*")
    assert bench.label_columns == tuple(filter(known.fullmatch, table[0]))
    sides = [pair.clips if is_paired else (clip,) for pair in PAIRS for clip in pair.clips[: 1 if is_paired else 2]]
    for clips, row, cells in zip(sides, bench.rows, table, strict=True):
        for item_id, clip in zip(row.item_ids, clips, strict=True):
            video, problem = f"videos/{clip.name}", judge_problem(cells["prompt"])
            assert item_id == compute_item_id(video, problem=problem)
            assert bench.items[item_id] == VideoTask(item_id, str(tmp_path / video), problem)
        assert row.labels == tuple(LABELS[cells[name]] for name in bench.label_columns)
        has_no_models = bench_type in ("tabench", "videofeedback")
        assert row.models == (None if has_no_models else tuple(clip.generator for clip in clips))


def test_every_spelling_of_a_label_is_read(tmp_path):
    common = {" ": None, "NaN": None, "Invalid": None, "A": 1}
    for bench_type, own in (("tabench", {"Video 2 is better": -1, '{"gsb_result": null}': None}), ("genai", LABELS)):
        label, cells = list(GOOD[bench_type])[-1], common | own
        bench = read_bench(write_bench(tmp_path, [{**GOOD[bench_type], label: cell} for cell in cells]), bench_type)
        assert [row.labels for row in bench.rows] == [(value,) for value in cells.values()]


def test_a_react_column_without_any_label_is_not_a_label_column(tmp_path, caplog):
    caplog.set_level("INFO")
    base = {**GOOD["react"], "GSB_MQ": "B", "GSB_MQ_A_reasoning": "A is blurred", "GSB_empty": ""}
    rows = [base, {**base, "GSB_overall": "same", "GSB_MQ_A_reasoning": ""}]
    bench = read_bench(write_bench(tmp_path, rows), "react")
    assert bench.label_columns == ("GSB_overall", "GSB_MQ", "GSB_empty")
    assert [row.labels for row in bench.rows] == [(1, -1, None), (0, -1, None)]
    assert caplog.text.count("no label in GSB_MQ_A_reasoning") == 1
    with pytest.raises(CsvError, match=r"row 1 .*GSB_overall: 'A is blurred' is not a label"):
        read_bench(write_bench(tmp_path, [{**GOOD["react"], "GSB_overall": "A is blurred"}]), "react")


def test_each_video_and_problem_is_one_item_and_duplicate_rows_are_counted(tmp_path):
    videos = [f"v/{index}.mp4" for index in range(4)]
    pairs = [(a, b, prompt) for prompt in ("x", "y") for a in videos for b in videos if a < b]
    rows = [{"video_A": a, "video_B": b, "prompt": prompt, "answer": "A"} for a, b, prompt in pairs]
    rows += [{**rows[0], **change} for change in ({}, {"video_A": " ./z//../v/0.mp4 "}, {"answer": "video 1"})]
    bench = read_bench(write_bench(tmp_path, [*rows, {**rows[0], "answer": "B"}], videos=videos), "tabench")
    assert (len(bench.rows), len(bench.items), bench.num_duplicate_rows) == (12 + 4, 4 * 2, 3)
    for (a, b, prompt), row in zip(pairs, bench.rows, strict=False):
        items = [(bench.items[item_id].video, bench.items[item_id].problem) for item_id in row.item_ids]
        assert items == [(str(tmp_path / video), judge_problem(prompt)) for video in (a, b)]


def test_item_ids_do_not_change_when_the_folder_moves(tmp_path):
    first, second = (read_bench(write_bench(tmp_path / name, [TABENCH]), "tabench") for name in ("here", "there"))
    assert (list(first.items), first.rows) == (list(second.items), second.rows)
    # Journals name items by these ids: a change of this value orphans them.
    assert compute_item_id("./v/a.mp4", problem="Judge.") == "ba55e764e5c0ac60"


def test_paths_start_from_the_csv_or_video_root_and_missing_videos_are_listed(tmp_path):
    data = tmp_path / "data"
    rows = [{**TABENCH, "video_B": str(data / "b.mp4")}, {**TABENCH, "video_B": "gone.mp4"}]
    path = write_bench(data, rows)
    elsewhere = write_bench(tmp_path, path.read_bytes(), videos=())
    for bench in (read_bench(path, "tabench"), read_bench(elsewhere, "tabench", video_root=str(data))):
        assert [item.video for item in bench.items.values()] == [str(data / f"{n}.mp4") for n in ("a", "b", "gone")]
        assert bench.missing == {bench.rows[1].item_ids[1]: f"video not found: {data / 'gone.mp4'}"}
    with pytest.raises(CsvError, match=r"no video exists, .*/empty/a\.mp4 for one; .* Set video_root"):
        read_bench(write_bench(tmp_path / "empty", [TABENCH], videos=()), "tabench")
    with pytest.raises(CsvError, match=r"video_root .*absent is not a folder"):
        read_bench(path, "tabench", video_root=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("bench_type", "change", "message"),
    [
        ("tabench", {"video_A": " "}, "video_A is ' '; write the path of a video"),
        ("tabench", {"prompt": " "}, "prompt is empty; write the text that the video was made from"),
        ("videoalign", {"Overall": "leftvote"}, "Overall: 'leftvote' is not a label. Write A, B, same or invalid"),
    ],
)
def test_faulty_cells_name_file_row_line_and_remedy(tmp_path, bench_type, change, message):
    rows = [{**GOOD[bench_type], "prompt": "three\nlong\nlines"}, {**GOOD[bench_type], **change}]
    with pytest.raises(CsvError, match=rf"bench.csv: 1 fault\(s\)\n  row 2 \(line 5\): {message}"):
        read_bench(write_bench(tmp_path, rows), bench_type)


def test_a_file_of_another_format_lacks_columns(tmp_path):
    with pytest.raises(CsvError, match=r"(?s)video_B.*prompt"):
        read_bench(write_bench(tmp_path, b"video_A,answer"), "tabench")
