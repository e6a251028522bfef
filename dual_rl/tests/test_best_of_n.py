"""Best-of-N: the expectation against all draws, folders of candidates, and the example as users run it."""

import csv
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from scoring.best_of_n import build_tasks, compute_expected_best, find_candidates

DUAL_RL = Path(__file__).resolve().parents[1]
CLIPS = sorted((DUAL_RL / "data" / "videos").glob("*.mp4"))


def best_of_all_draws(rewards: list[float], values: list[float], n: int) -> float:
    """The mean value of the best clip of every draw; of several best ones, their mean."""
    means = []
    for draw in itertools.combinations(range(len(rewards)), n):
        top = max(rewards[i] for i in draw)
        means.append(fmean(values[i] for i in draw if rewards[i] == top))
    return fmean(means)


def test_expectation_is_that_of_all_draws():
    rng = random.Random(0)
    for _ in range(300):
        count = rng.randint(1, 7)
        rewards = rng.sample(range(100), count)
        values = [rng.random() for _ in range(count)]
        for n in range(1, count + 1):
            expected = best_of_all_draws(rewards, values, n)
            assert compute_expected_best(rewards, values, n=n) == pytest.approx(expected)


def test_equal_rewards_share_alike():
    """Whoever is first among equals must not matter: two equal best clips are worth their mean."""
    assert compute_expected_best([1, 1, 0], [4.0, 2.0, 0.0], n=3) == 3.0
    assert compute_expected_best([1, 1, 0], [2.0, 4.0, 0.0], n=2) == 3.0
    assert compute_expected_best([5, 5], [0.0, 1.0], n=1) == 0.5


def make_candidates(folder: Path) -> Path:
    for number in range(2):
        inner = folder / f"prompt_{number}"
        inner.mkdir(parents=True)
        (inner / "prompt.txt").write_text(f"shape number {number}\n")
        for place, clip in enumerate(CLIPS[3 * number : 3 * number + 3]):
            shutil.copy(clip, inner / f"{place}.mp4")
    return folder


def test_folders_become_tasks(tmp_path):
    candidates = find_candidates(make_candidates(tmp_path))
    assert [(group.name, group.prompt, len(group.clips)) for group in candidates] == [
        ("prompt_0", "shape number 0", 3),
        ("prompt_1", "shape number 1", 3),
    ]
    tasks = build_tasks(candidates, ["first", "second"])
    assert [(task.name, task.problem) for task in tasks][2:4] == [
        ("prompt_0/2.mp4", "first"),
        ("prompt_1/0.mp4", "second"),
    ]


def test_folders_that_lack_something_are_listed(tmp_path):
    make_candidates(tmp_path)
    (tmp_path / "prompt_0" / "prompt.txt").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)empty has no text.*empty has no clip.*prompt_0 has no text") as error:
        find_candidates(tmp_path)
    assert "prompt_1" not in str(error.value)
    with pytest.raises(ValueError, match="has no sub-folder"):
        find_candidates(tmp_path / "prompt_1")


def test_the_example_ranks_clips_and_lists_failures(tmp_path, small_model):
    folder = make_candidates(tmp_path / "clips")
    (folder / "prompt_1" / "2.mp4").write_bytes(b"no video")
    output = tmp_path / "best.csv"
    command = [sys.executable, str(DUAL_RL / "examples" / "best_of_n.py"), "--model_ckpt", str(small_model)]
    command += ["--clips", str(folder), "--output", str(output), "--backend", "hf", "--max_new_tokens", "6"]
    environment = {**os.environ, "PYTHONPATH": str(DUAL_RL), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert "failed: prompt_1/2.mp4: video does not decode" in result.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "1", "2", ""]
    for name in ("prompt_0", "prompt_1"):
        rewards = [float(row["reward"]) for row in rows if row["folder"] == name and row["reward"]]
        assert rewards == sorted(rewards, reverse=True)
    assert f"prompt_0: {rows[0]['video']}" in result.stdout
