"""Running jobs: order, resuming, failures; and the smallest real run of everything (slow)."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from evidence import running
from evidence.machine import Machine
from evidence.plan import Job
from evidence.running import Runner

RUN = Path(__file__).resolve().parents[1] / "run_evidence.py"
TRIAL = [sys.executable, str(RUN), "--size", "trial", "--device", "cpu"]


@pytest.fixture
def runner(tmp_path, monkeypatch) -> Runner:
    monkeypatch.setattr(running, "REPOSITORY", tmp_path)
    monkeypatch.setattr(running, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(running, "SECONDS_TO_END", 1.0)
    return Runner(tmp_path / "work", machine=Machine(num_jobs=2, num_cores=2))


def shell(name: str, script: str, *needs: str) -> Job:
    """A job that runs `script` and should leave a file of its name."""
    return Job(name, ("bash", "-c", script), name, needs=needs, seconds=0.1)


def test_jobs_run_after_what_they_need_once_and_with_one_command(runner, tmp_path):
    jobs = [shell("one", "sleep 0.2; echo 1 >> one"), shell("two", "cat one > two; echo 2 >> two", "one")]
    assert runner.run(jobs) == []
    assert (tmp_path / "two").read_text() == "1\n2\n"
    assert runner.run(jobs) == []
    assert (tmp_path / "one").read_text() == "1\n"
    with pytest.raises(ValueError, match="belongs to another command"):
        runner.run([shell("one", "touch one; true")])


def test_a_job_that_fails_is_tried_again_and_stops_only_what_needs_it(runner, tmp_path):
    jobs = [
        shell("fails", "echo x >> tries; exit 3"),
        shell("needs_it", "touch needs_it", "fails"),
        shell("unlucky", "test -e once && touch unlucky; touch once"),
        shell("leaves_nothing", "true"),
        shell("other", "touch other"),
    ]
    assert sorted(runner.run(jobs)) == ["fails", "leaves_nothing", "needs_it"]
    assert (tmp_path / "tries").read_text() == "x\n" * 2
    assert [(tmp_path / name).exists() for name in ("unlucky", "other", "needs_it")] == [True, True, False]
    assert "exit 3" in (tmp_path / "work" / "logs" / "fails.log").read_text()


def test_when_the_time_is_up_jobs_are_ended_and_none_starts_that_would_not_end(runner, tmp_path):
    runner.minutes = 1 / 60
    jobs = [shell("quick", "touch quick"), shell("slow", "sleep 60"), replace(shell("long", "true"), seconds=60.0)]
    with pytest.raises(TimeoutError, match=r"in 0.0166667 minutes: 2 jobs are left"):
        runner.run(jobs)
    assert [runner.is_done(job) for job in jobs] == [True, False, False]
    assert sorted(path.name for path in (tmp_path / "work" / "logs").iterdir()) == ["quick.log", "slow.log"]


def test_a_terminated_driver_ends_its_jobs_and_writes_results(tmp_path):
    """As `kill` does; jobs lead groups of their own and would live on."""
    results, work = tmp_path / "trial.json", tmp_path / "work"
    command = [*TRIAL, "--only", "world", "--work", str(work), "--results", str(results)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (work / "logs" / "world.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert json.loads(results.read_text())["scores"] == []
    assert (tmp_path / "trial.md").is_file()
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not any(path in listing for path in (str(work), os.path.relpath(work, RUN.parents[1])))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_run_trains_scores_and_draws_everything(tmp_path):
    results = tmp_path / "trial.json"
    command = [*TRIAL, "--jobs", "2", "--work", str(tmp_path / "work"), "--results", str(results)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    content = json.loads(results.read_text())
    assert {"descore", "coupled", "stage1", "discriminative", "misattached"} <= {s["arm"] for s in content["scores"]}
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"trial_accuracy", "trial_curves", "trial_data", "trial_ablations"}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 to run" in again.stderr
    assert json.loads(results.read_text()) == content
