"""Running jobs: order, resuming, failures; and the smallest real run of everything (slow)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evidence import running
from evidence.machine import Machine
from evidence.plan import Job
from evidence.running import Runner, describe_commit, order_jobs

RUN = Path(__file__).resolve().parents[1] / "run_evidence.py"


@pytest.fixture
def runner(tmp_path, monkeypatch) -> Runner:
    monkeypatch.setattr(running, "REPOSITORY", tmp_path)
    monkeypatch.setattr(running, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(running, "SECONDS_TO_END", 1.0)
    return Runner(tmp_path / "work", machine=Machine(num_jobs=2, num_cores=2))


def shell(name: str, script: str, *needs: str) -> Job:
    """A job that runs `script` and is to leave a file of its name."""
    return Job(name, ("bash", "-c", script), name, needs=needs, seconds=0.1)


def test_jobs_run_after_what_they_need_and_once(runner, tmp_path):
    jobs = [shell("one", "sleep 0.2; echo 1 >> one"), shell("two", "cat one > two; echo 2 >> two", "one")]
    assert runner.run(jobs) == []
    assert (tmp_path / "two").read_text() == "1\n2\n"
    mark = json.loads((tmp_path / "work" / "done" / "one.json").read_text())
    assert set(mark) == {"name", "command", "commit", "started", "seconds"}
    assert mark["seconds"] >= 0.2
    assert runner.run(jobs) == []
    assert (tmp_path / "one").read_text() == "1\n"


def test_independent_jobs_run_at_the_same_time_but_no_more_than_asked(runner, tmp_path):
    script = "echo x >> running; sleep 0.3; wc -l < running > {0}; sed -i 1d running"
    assert runner.run([shell(name, script.format(name)) for name in ("a", "b", "c")]) == []
    counts = [int((tmp_path / name).read_text()) for name in ("a", "b", "c")]
    assert max(counts) == 2


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
    assert (tmp_path / "unlucky").exists()
    assert (tmp_path / "other").exists()
    assert not (tmp_path / "needs_it").exists()
    assert "exit 3" in (tmp_path / "work" / "logs" / "fails.log").read_text()


def test_jobs_at_the_same_time_see_a_gpu_each_which_no_record_names(runner, tmp_path):
    runner.machine = Machine(num_jobs=2, num_cores=2, gpus=("6", "9"))
    script = "echo $CUDA_VISIBLE_DEVICES > {0}; sleep 0.3"
    jobs = [shell(name, script.format(name)) for name in ("a", "b", "c")]
    assert runner.run(jobs) == []
    seen = [(tmp_path / name).read_text().strip() for name in ("a", "b", "c")]
    assert sorted(seen[:2]) == ["6", "9"]
    assert seen[2] in seen[:2]
    for job in jobs:
        mark = json.loads((tmp_path / "work" / "done" / f"{job.name}.json").read_text())
        assert mark["command"] == job.text
        assert "CUDA_VISIBLE_DEVICES=" not in job.text


def test_when_the_time_is_up_jobs_are_ended_and_no_other_starts(runner, tmp_path):
    runner.minutes = 1 / 60
    jobs = [
        shell("quick", "touch quick"),
        shell("slow", "sleep 60; touch slow"),
        shell("later", "touch later", "slow"),
    ]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"in 0.0166667 minutes: 2 jobs are left"):
        runner.run(jobs)
    assert time.monotonic() - start < 30
    assert runner.is_done(jobs[0])
    assert not runner.is_done(jobs[1])
    assert sorted(path.name for path in (tmp_path / "work" / "logs").iterdir()) == ["quick.log", "slow.log"]


def test_a_job_that_would_not_end_in_time_does_not_start(runner):
    runner.minutes = 10 / 60
    jobs = [shell("quick", "touch quick"), dataclasses.replace(shell("long", "touch long"), seconds=60.0)]
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="1 jobs are left"):
        runner.run(jobs)
    assert time.monotonic() - start < 5
    assert [runner.is_done(job) for job in jobs] == [True, False]


def test_what_the_longest_work_waits_for_starts_first():
    lengths = {"short": 50.0, "long": 40.0, "middle": 30.0, "score_short": 1.0, "score_middle": 2.0}
    needs = {"middle": ("long",), "score_short": ("short",), "score_middle": ("middle",)}
    jobs = [Job(name, ("true",), name, needs=needs.get(name, ()), seconds=lengths[name]) for name in lengths]
    assert [job.name for job in order_jobs(jobs)] == ["long", "short", "middle", "score_middle", "score_short"]


def test_what_was_done_with_another_command_is_not_taken_for_this_one(runner):
    assert runner.run([shell("one", "touch one")]) == []
    with pytest.raises(ValueError, match="belongs to another command"):
        runner.run([shell("one", "touch one; true")])


def test_commit_is_named(monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    commit = describe_commit()
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) >= 7
    monkeypatch.setenv("COMMIT", "0123456789ab")
    assert describe_commit() == "0123456789ab"


def test_a_driver_that_is_told_to_end_ends_its_jobs_and_writes_results(tmp_path):
    """As `kill` does; jobs lead groups of their own and would live on."""
    results, work = tmp_path / "trial.json", tmp_path / "work"
    command = [sys.executable, str(RUN), "--size", "trial", "--device", "cpu", "--only", "world"]
    process = subprocess.Popen(
        [*command, "--work", str(work), "--results", str(results)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = work / "logs" / "world.log"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert json.loads(results.read_text())["scores"] == []
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(work) not in listing.replace(os.path.relpath(work, RUN.parents[1]), str(work))


def test_a_driver_whose_time_is_up_writes_results_too(tmp_path):
    results, work = tmp_path / "trial.json", tmp_path / "work"
    command = [sys.executable, str(RUN), "--size", "trial", "--device", "cpu", "--only", "world", "--minutes", "0"]
    paths = ["--work", str(work), "--results", str(results)]
    run = subprocess.run([*command, *paths], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 1
    assert "in 0 minutes: 1 jobs are left; the same command goes on" in run.stderr
    assert json.loads(results.read_text())["jobs"] == []
    assert (tmp_path / "trial.md").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_run_trains_scores_and_draws_everything(tmp_path):
    results = tmp_path / "trial.json"
    command = [sys.executable, str(RUN), "--size", "trial", "--device", "cpu", "--jobs", "2"]
    options = ["--work", str(tmp_path / "work"), "--results", str(results)]
    first = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    content = json.loads(results.read_text())
    arms = {(score["arm"], score["read"]) for score in content["scores"]}
    wanted = {("descore", "own"), ("descore", "text"), ("coupled", "text"), ("stage1", "own"), ("mask_0", "masked"),
              ("discriminative", "masked"), ("misattached", "own"), ("stage1_data_10", "own")}  # fmt: skip
    assert wanted <= arms
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"trial_{name}.png" for name in ("accuracy", "curves", "data", "ablations")
    }
    again = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "0 to run" in again.stderr
    assert json.loads(results.read_text()) == content
