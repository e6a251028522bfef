"""The journal of scored videos: what a killed run leaves, and what is refused."""

import json
import os
import re
from pathlib import Path

import pytest

from scoring.journal import Journal
from scoring.types import FailedVideo, ScoredVideo

IDENTITY = {"model": "mine", "weights": "0f3a", "max_new_tokens": 8, "video": {"fps": 2.0}, "max_pixels": None}
SCORED = [
    ScoredVideo("first", 0.1 + 0.2, "two\nlines, \"quoted\" and 'so'", 12, True),
    ScoredVideo("second", -1e-300, "caf\u00e9 \u2028 \U0001f600 \x1c\0", 4096, False),
    ScoredVideo("third", -19.651287078857422, "", 0, True),
]
FIRST_LINE = json.dumps({"identity": IDENTITY}).encode() + b"\n"


def write_journal(path: Path) -> bytes:
    """The file's bytes after a run that was not interrupted."""
    with Journal(path, IDENTITY) as journal:
        for outcome in SCORED:
            journal.add(outcome)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path) -> Path:
    """Neither the journal nor its folder exists."""
    return tmp_path / "results" / "scores.rewards.jsonl"


def test_every_outcome_is_on_disk_at_once_and_comes_back(path):
    with Journal(path, IDENTITY) as journal:
        for number, video in enumerate(SCORED, start=1):
            journal.add(video)
            entries = [json.loads(line) for line in path.read_bytes().splitlines()]
            assert entries[0] == {"identity": IDENTITY}
            assert [entry["name"] for entry in entries[1:]] == [video.name for video in SCORED[:number]]
            assert [journal.read(earlier.name) for earlier in SCORED[number - 1 :: -1]] == SCORED[number - 1 :: -1]
        journal.add(FailedVideo("bad", "video is empty"))  # which is reported and not kept
        assert journal.failures == {"bad": "video is empty"}
    with Journal(path, {**IDENTITY, "video": {"fps": 2.0}}) as journal:
        assert journal.failures == {}
        assert journal.rewards == {video.name: video.reward for video in SCORED}
        assert [journal.read(video.name) for video in reversed(SCORED)] == SCORED[::-1]
        with pytest.raises(AssertionError, match="first was scored twice"):
            journal.add(SCORED[0])


def test_a_torn_line_is_dropped_and_scored_again(path):
    whole = write_journal(path)
    for end in [*range(0, len(whole), 5), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:end])
        with Journal(path, IDENTITY) as journal:
            num_whole = max(0, whole[:end].count(b"\n") - 1)
            assert list(journal.rewards) == [video.name for video in SCORED[:num_whole]]
            for video in SCORED[num_whole:]:
                journal.add(video)
        assert path.read_bytes() == whole


def test_rewards_of_another_run_are_refused_with_field_values_and_remedy(path):
    whole, other = write_journal(path), {**IDENTITY, "weights": "77aa"}
    message = f"{path} holds the rewards of another run, with another weights ('0f3a' there, '77aa' now). Choose"
    with pytest.raises(ValueError, match=re.escape(message)):
        Journal(path, other)
    assert path.read_bytes() == whole
    with Journal(path, other, overwrite=True) as journal:  # the refused one holds no lock
        assert journal.rewards == {}


def test_the_file_is_forced_to_disk_every_so_many_videos_and_at_the_end(path, monkeypatch):
    forced = []
    monkeypatch.setattr(os, "fsync", lambda _: forced.append(len(path.read_bytes().splitlines()) - 1))
    with Journal(path, IDENTITY, save_every=2) as journal:
        for number in range(5):
            journal.add(ScoredVideo(str(number), 0.0, "", 0, True))
    assert forced == [2, 4, 5]


@pytest.mark.parametrize(
    "content",
    [b"video_A,video_B\na.mp4,b.mp4\n", b'{"step": 1}\n', b"[1]\n", FIRST_LINE + b'{"note": "mine"}\n'],
)
def test_a_file_that_is_not_a_journal_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a journal of rewards\. Choose another output, or --overwrite"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content
