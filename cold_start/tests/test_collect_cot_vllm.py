"""Collecting CoTs with vLLM and the tiny base model, which judges clips of the toy world.

A run that is killed and started again ends with the files of an uninterrupted one, byte for byte.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from collect.local_server import serve
from cot_support import as_flags
from preference_csv import CsvNeeds, read_pairs
from stage1_support import STAGE_DIR, TINY_BASE
from toy_world.tables import read_table, write_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
NUM_PAIRS = 16
NUM_SAMPLES = 4 * 2 * NUM_PAIRS
SECONDS = 500.0
SAMPLING = {"max_tokens": 320, "temperature": 1.0, "top_p": 1.0, "num_samples": 4}


@pytest.fixture(scope="module")
def pairs_csv(tmp_path_factory) -> Path:
    """The toy world's training pairs, without CoTs and scores."""
    world = tmp_path_factory.mktemp("world")
    command = [sys.executable, "datasets/make_toy_world.py", "--output", str(world)]
    counts = ["--train_pairs", str(NUM_PAIRS), "--eval_pairs", "4"]
    subprocess.run([*command, *counts], cwd=STAGE_DIR, check=True, capture_output=True)
    columns = ("videos", "problem", "prompt", "GSB")
    rows = [{name: row[name] for name in columns} for row in read_table(world / "train.csv")]
    write_table(world / "pairs.csv", rows)
    return world / "pairs.csv"


def wait_until(is_done: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_done():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def collect(path: Path, name: str, *, kill_at: int | None = None, **options: object) -> Path:
    """Run `python -m collect.collect_cot` to its end, or until its journal has `kill_at` lines; the output."""
    output, log = path.with_name(f"{name}.csv"), path.with_name(f"{name}.log")
    arguments = [str(path), "--output", str(output), *as_flags(**{**SAMPLING, **options})]
    with log.open("wb") as console:
        command = [sys.executable, "-m", "collect.collect_cot", *arguments]
        process = subprocess.Popen(command, cwd=STAGE_DIR, stdout=console, stderr=subprocess.STDOUT)
    if kill_at is None:
        assert process.wait(SECONDS) == 0, log.read_text()
    else:
        journal = output.with_suffix(".samples.jsonl")
        wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= kill_at, process, log)
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL
        assert not output.exists()
        assert journal.read_bytes().count(b"\n") < NUM_SAMPLES
    return output


def files_of(output: Path) -> list[bytes | list[bytes]]:
    """The CSV, the report, and the samples in the order of their text."""
    samples = output.with_suffix(".samples.jsonl").read_bytes().splitlines()[1:]
    return [output.read_bytes(), output.with_suffix(".report.json").read_bytes(), sorted(samples)]


@pytest.fixture(scope="module")
def offline(pairs_csv) -> Path:
    """The output of an uninterrupted run with a vLLM of its own."""
    return collect(pairs_csv, "offline", model=TINY_BASE)


def test_tiny_base_collects_cots_that_training_takes(offline):
    report, rows = json.loads(offline.with_suffix(".report.json").read_text()), read_table(offline)
    assert (report["videos"], report["samples"], report["failures"]) == (2 * NUM_PAIRS, NUM_SAMPLES, [])
    assert report["rows"] == report["rows_with_collected_cots"] == NUM_PAIRS
    assert report["rows_agreeing"] > 0.8 * NUM_PAIRS
    assert len(read_pairs(offline, CsvNeeds())) == NUM_PAIRS
    assert all(row["CoT_A"].startswith("Subject") and row["CoT_A"].endswith("</answer>") for row in rows)


def test_killed_run_ends_like_an_uninterrupted_one(offline, pairs_csv):
    collect(pairs_csv, "killed", kill_at=NUM_SAMPLES // 3, model=TINY_BASE)
    # Another number of videos at a time changes the batches, and nothing else.
    assert files_of(collect(pairs_csv, "killed", model=TINY_BASE, concurrency=5)) == files_of(offline)


def test_clips_on_a_server_give_prompts_of_the_length_of_training(pairs_csv):
    with serve(str(TINY_BASE), max_model_len=1024) as url:
        output = collect(pairs_csv, "clips", model=TINY_BASE, endpoint=url)
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert (report["samples_with_another_prompt"], report["rows_with_collected_cots"]) == (0, NUM_PAIRS)
