"""The journal of scored videos: what a killed run leaves, and what is refused."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from scoring.journal import Journal
from scoring.scoring import FailedVideo, ScoredVideo

IDENTITY = {"model": "mine", "weights": "0f3a", "max_new_tokens": 8, "video": {"fps": 2.0}, "max_pixels": None}
SCORED = [
    ScoredVideo("first", 0.1 + 0.2, "two\nlines, \"quoted\" and 'so'", 12, True),
    ScoredVideo("second", -1e-300, "caf\u00e9 \u2028 \U0001f600 \x1c\0", 4096, False),
    ScoredVideo("third", -19.651287078857422, "", 0, True),
]
NO_JOURNAL = "is no journal of rewards: choose another output, or --overwrite"
NAMELESS = b'{"identity": ' + json.dumps(IDENTITY).encode() + b'}\n{"note": "mine"}\n'


def write_journal(path: Path, outcomes: Sequence[ScoredVideo | FailedVideo] = SCORED) -> bytes:
    """The file's bytes after a run that was not interrupted."""
    with Journal(path, IDENTITY) as journal:
        for outcome in outcomes:
            journal.add(outcome)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path) -> Path:
    """Where a journal may come to lie; neither it nor its folder is there."""
    return tmp_path / "results" / "scores.rewards.jsonl"


def test_everything_comes_back(path):
    write_journal(path)
    with Journal(path, IDENTITY) as journal:
        assert journal.rewards == {video.name: video.reward for video in SCORED}
        assert [journal.read(video.name) for video in reversed(SCORED)] == SCORED[::-1]


def test_reading_between_additions_harms_neither(path):
    whole = write_journal(path)
    path.unlink()
    with Journal(path, IDENTITY) as journal:
        for number, video in enumerate(SCORED, start=1):
            journal.add(video)
            assert [journal.read(earlier.name) for earlier in SCORED[number - 1 :: -1]] == SCORED[number - 1 :: -1]
    assert path.read_bytes() == whole


def test_what_is_scored_is_in_the_file_at_once(path):
    with Journal(path, IDENTITY) as journal:
        for number, video in enumerate(SCORED, start=1):
            journal.add(video)
            entries = [json.loads(line) for line in path.read_bytes().splitlines()]
            assert entries[0] == {"identity": IDENTITY}
            assert [entry["name"] for entry in entries[1:]] == [video.name for video in SCORED[:number]]


def test_a_last_line_torn_anywhere_is_dropped_and_the_rest_kept(path):
    whole = write_journal(path)
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path, IDENTITY) as journal:
            assert list(journal.rewards) == ["first", "second"]
            assert [journal.read(video.name) for video in SCORED[:2]] == SCORED[:2]
            assert path.read_bytes() == whole[:start]
            journal.add(SCORED[2])
        assert path.read_bytes() == whole


def test_a_first_line_torn_anywhere_begins_anew(path):
    whole = write_journal(path)
    for end in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:end])
        assert write_journal(path) == whole


@pytest.mark.parametrize(
    ("field", "there", "now"),
    [
        ("weights", "'0f3a'", "'77aa'"),
        ("max_new_tokens", "8", "4096"),
        ("max_pixels", "None", "50176"),
        ("video", "{'fps': 2.0}", "{'fps': 4.0}"),
        ("backend", "None", "'vllm'"),
    ],
)
def test_rewards_of_another_run_are_refused_with_the_field_its_values_and_the_remedy(path, field, there, now):
    whole = write_journal(path)
    identity = {**IDENTITY, field: {"weights": "77aa", "max_new_tokens": 4096, "max_pixels": 50176,
                                    "video": {"fps": 4.0}, "backend": "vllm"}[field]}  # fmt: skip
    message = (
        f"{path} holds the rewards of another run, with another {field} ({there} there, {now} now): choose another "
        "output, or start clean with --overwrite"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as refused:
        Journal(path, identity)
    assert path.read_bytes() == whole
    with Journal(path, IDENTITY) as journal:
        assert len(journal.rewards) == 3, f"the one that was refused, {refused}, holds the file no longer"


def test_overwrite_starts_clean(path):
    whole = write_journal(path)
    with Journal(path, {**IDENTITY, "weights": "77aa"}, overwrite=True) as journal:
        assert journal.rewards == {}
        journal.add(SCORED[0])
    assert path.read_bytes() == b"".join(whole.replace(b"0f3a", b"77aa").splitlines(keepends=True)[:2])


def test_an_identity_is_the_same_after_its_way_through_json(path):
    with Journal(path, {"size": (1, 2)}) as journal:
        journal.add(SCORED[0])
    with Journal(path, {"size": (1, 2)}) as journal:
        assert list(journal.rewards) == ["first"]


def test_two_runs_cannot_write_at_the_same_time(path):
    message = f"{path} is being written by another run: wait for it, or choose another output"
    with Journal(path, IDENTITY) as journal:
        journal.add(SCORED[0])
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                Journal(path, IDENTITY, overwrite=overwrite)
        journal.add(SCORED[1])
    with Journal(path, IDENTITY) as journal:
        assert list(journal.rewards) == ["first", "second"]


def test_a_file_system_without_locks_is_warned_of(path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Journal(path, IDENTITY) as journal:
        journal.add(SCORED[0])
    assert f"{path} cannot be locked" in caplog.text
    with Journal(path, IDENTITY) as journal:
        assert list(journal.rewards) == ["first"]


def test_failures_are_told_and_not_kept(path):
    with Journal(path, IDENTITY) as journal:
        journal.add(FailedVideo("bad", "video is empty"))
        journal.add(SCORED[0])
        assert (journal.failures, list(journal.rewards)) == ({"bad": "video is empty"}, ["first"])
    with Journal(path, IDENTITY) as journal:
        assert (journal.failures, list(journal.rewards)) == ({}, ["first"])
        journal.add(ScoredVideo("bad", 1.0, "repaired", 1, True))
    assert b"empty" not in path.read_bytes()


def test_a_name_is_scored_once(path):
    write_journal(path, SCORED[:1])
    with Journal(path, IDENTITY) as journal:
        journal.add(SCORED[1])
        for video in SCORED[:2]:
            with pytest.raises(AssertionError, match=f"{video.name} was scored twice"):
                journal.add(video)


def test_the_file_is_forced_to_disk_every_so_many_videos_and_at_the_end(path, monkeypatch):
    forced = []
    monkeypatch.setattr(os, "fsync", lambda _: forced.append(len(path.read_bytes().splitlines()) - 1))
    with Journal(path, IDENTITY, save_every=2) as journal:
        for number in range(5):
            journal.add(ScoredVideo(str(number), 0.0, "", 0, True))
    assert forced == [2, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"video_A,video_B\na.mp4,b.mp4\n", NO_JOURNAL),
        (b"\n", NO_JOURNAL),
        (b'{"step": 1}\n', "choose another output, or "),
        (b"[1, 2]\n", "choose another output, or "),
        (NAMELESS.splitlines(keepends=True)[0] + b"torn {\n", NO_JOURNAL),
        (b"my notes, one line", NO_JOURNAL),
        (NAMELESS, NO_JOURNAL),
    ],
    ids=["csv", "blank line", "another json", "a list", "garbage later", "no line end", "no name"],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path, content, message):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content
