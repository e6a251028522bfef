"""The journal of samples: what a killed run leaves, and what must not be mixed."""

import errno

import pytest

from infer_utils.cot_journal import CotJournal, Sample, SampleKey

IDENTITY = {"model": "m", "sampling": {"seed": 0}}


def make_sample(number: int) -> Sample:
    text = f'line {number}\n"quoted", \u00e9\u2028 \r end'
    return Sample(SampleKey(1, "A", number), text, is_finished=number % 2 == 0, num_prompt_tokens=80 + number)


@pytest.fixture
def path(tmp_path):
    with CotJournal(tmp_path / "out.samples.jsonl", IDENTITY) as journal:
        for number in range(3):
            journal.add(make_sample(number))
    return tmp_path / "out.samples.jsonl"


def test_samples_are_there_again(path):
    with CotJournal(path, IDENTITY) as journal:
        assert len(journal) == 3
        journal.add(make_sample(3))
        assert [journal.read(SampleKey(1, "A", number)) for number in (3, 0, 2, 1)] == [
            make_sample(number) for number in (3, 0, 2, 1)
        ]
        assert SampleKey(1, "B", 0) not in journal


def test_journal_killed_at_any_byte_goes_on(path):
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with CotJournal(path, IDENTITY) as journal:
            assert len(journal) == max(content[:size].count(b"\n") - 1, 0)  # the first line is the identity
            for number in range(len(journal), 3):
                journal.add(make_sample(number))
        assert path.read_bytes() == content


def test_another_run_is_refused_and_told_apart(path):
    with pytest.raises(ValueError, match=r"sampling \(\{'seed': 0\} there, \{'seed': 1\} now\).*--overwrite"):
        CotJournal(path, {**IDENTITY, "sampling": {"seed": 1}})
    with CotJournal(path, {**IDENTITY, "sampling": {"seed": 1}}, overwrite=True) as journal:
        assert len(journal) == 0


def test_two_runs_at_a_time_are_refused(path):
    with CotJournal(path, IDENTITY), pytest.raises(ValueError, match="being written by another run"):
        CotJournal(path, IDENTITY)


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with CotJournal(tmp_path / "out.samples.jsonl", IDENTITY) as journal:
        journal.add(make_sample(0))
    assert "out.samples.jsonl cannot be locked" in caplog.text
    assert "start no second run with this --output" in caplog.text


@pytest.mark.parametrize("content", [b"videos,GSB\n", b"my notes", b"[1]\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "out.samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no journal of samples|another run"):
        CotJournal(path, IDENTITY)
    assert path.read_bytes() == content
