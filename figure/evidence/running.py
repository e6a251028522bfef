"""Runs the plan's jobs, several at a time, and remembers which are done, so that a stopped run goes on.

A job that has succeeded leaves `done/NAME.json`: its command, the commit it ran at, when, and how long it took. What
it prints is in `logs/NAME.log`. A job that was stopped half way is started again and continues as its command does.
"""

import json
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from evidence.machine import Machine
from evidence.plan import Job

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_SECONDS = 1.0
SECONDS_TO_END = 20.0

logger = logging.getLogger("evidence")


@dataclass
class Running:
    """A job under way: its process, which leads a group of its own, in which slot, and since when."""

    job: Job
    slot: int
    process: subprocess.Popen
    started: datetime
    clock: float


class Runner:
    """Runs jobs in the repository root; `work`: where logs and done marks go. `attempts`: tries of a failing job.

    `minutes`: after which it stops; a job that is not likely to end before does not start.
    """

    def __init__(self, work: Path, *, machine: Machine, attempts: int = 2, minutes: float = math.inf) -> None:
        self.done, self.logs = work / "done", work / "logs"
        self.machine, self.attempts, self.minutes = machine, attempts, minutes
        self.commit = describe_commit()
        self._running: list[Running] = []
        self._tries: dict[str, int] = {}

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Run what is not done; returns the names of jobs that failed or need one that did.

        Raises ValueError when a job was done with another command, TimeoutError when the time is up.
        """
        limit = time.monotonic() + 60 * self.minutes
        for folder in (self.done, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        waiting = order_jobs([job for job in jobs if not self.is_done(job)])
        finished, failed = {job.name for job in jobs} - {job.name for job in waiting}, []
        logger.info("%d jobs are done, %d to run", len(finished), len(waiting))
        try:
            while waiting or self._running:
                for job in [job for job in waiting if set(job.needs) & set(failed)]:
                    waiting.remove(job)
                    failed.append(job.name)
                now = time.monotonic()
                free = [job for job in waiting if set(job.needs) <= finished]
                ready = [job for job in free if now + job.seconds <= limit]
                if now > limit or (free and not ready and not self._running):
                    left = f"{len(waiting) + len(self._running)} jobs are left"
                    raise TimeoutError(f"no time in {self.minutes:g} minutes: {left}; the same command goes on")
                for job in ready[: self.machine.num_jobs - len(self._running)]:
                    waiting.remove(job)
                    self._start(job)
                time.sleep(POLL_SECONDS)
                for job, has_succeeded in self._collect():
                    if has_succeeded:
                        finished.add(job.name)
                    elif self._tries[job.name] < self.attempts:
                        waiting.insert(0, job)
                    else:
                        failed.append(job.name)
        finally:
            self._stop()
        return failed

    def is_done(self, job: Job) -> bool:
        """Whether the job has succeeded; raises ValueError when that was with another command."""
        mark = self.done / f"{job.name}.json"
        if not mark.is_file():
            return False
        done = json.loads(mark.read_text())["command"]
        if done != job.text:
            raise ValueError(
                f"{mark} belongs to another command: {done}\nnow it is {job.text}\n"
                "choose another --work, or remove the mark and what the job wrote"
            )
        return True

    def _start(self, job: Job) -> None:
        self._tries[job.name] = self._tries.get(job.name, 0) + 1
        slot = min(set(range(self.machine.num_jobs)) - {running.slot for running in self._running})
        with (self.logs / f"{job.name}.log").open("a") as log:
            log.write(f"$ {job.text}\n")
            log.flush()
            process = subprocess.Popen(
                job.command,
                cwd=REPOSITORY,
                env={**self.machine.environment(slot), **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(Running(job, slot, process, datetime.now(UTC), time.monotonic()))
        logger.info("%s  started", job.name)

    def _collect(self) -> list[tuple[Job, bool]]:
        """Jobs that have ended, and whether they succeeded."""
        ended = [running for running in self._running if running.process.poll() is not None]
        results = []
        for running in ended:
            self._running.remove(running)
            job, seconds = running.job, time.monotonic() - running.clock
            has_succeeded = running.process.returncode == 0 and (REPOSITORY / job.output).exists()
            if has_succeeded:
                self._mark(running, seconds)
            state = "done" if has_succeeded else f"failed, see {self.logs / job.name}.log"
            logger.info("%s  %s after %.0f s", job.name, state, seconds)
            results.append((job, has_succeeded))
        return results

    def _mark(self, running: Running, seconds: float) -> None:
        content = {
            "name": running.job.name,
            "command": running.job.text,
            "commit": self.commit,
            "started": running.started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
        }
        mark = self.done / f"{running.job.name}.json"
        temporary = mark.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, mark)

    def _stop(self) -> None:
        """End what is under way, as Ctrl-C would (runs in the background may not hear that), and kill what is left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            for running in self._running:
                if running.process.poll() is None:
                    os.killpg(running.process.pid, number)
            limit = time.monotonic() + SECONDS_TO_END
            while time.monotonic() < limit and any(running.process.poll() is None for running in self._running):
                time.sleep(POLL_SECONDS / 10)
        self._running.clear()


def order_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The longest chains first: what waits for the most seconds of work behind it must not wait itself.

    `jobs`: each behind what it needs.
    """
    chain: dict[str, float] = {}  # seconds from a job's start to the end of all that waits for it
    for job in reversed(jobs):
        behind = [chain[other.name] for other in jobs if job.name in other.needs]
        chain[job.name] = job.seconds + max(behind, default=0.0)
    return sorted(jobs, key=lambda job: -chain[job.name])


def describe_commit() -> str:
    """What the variable COMMIT says, else the checked-out commit, with `-dirty` when tracked files differ from it.

    "unknown" without both, as in a copy without a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        result = None
    described = result.stdout.strip() if result and result.returncode == 0 else ""
    return os.environ.get("COMMIT") or described or "unknown"
