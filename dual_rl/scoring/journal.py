"""What a run has scored so far: one JSON line per video, written as soon as it is known.

A killed run leaves a journal of whole lines and at most one torn line, which is dropped; the next run scores what is
missing. The first line says what the rewards depend on, so that those of another run are never mixed in. Failures are
not kept: a video that was repaired is tried again.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from scoring.types import FailedVideo, Outcome, ScoredVideo, Thought

logger = logging.getLogger(__name__)

FIRST_BYTES = b'{"identity": '
"""How a journal begins."""


class Journal:
    """The open journal of this run. Close it, or use it as a context manager.

    `rewards`: by task name, of this run and earlier ones. `failures`: of this run. `read` gets chains of thought from
    disk.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], *, overwrite: bool = False, save_every: int = 100):
        """Open or begin. `identity`: what rewards depend on, JSON values. `overwrite`: drop another run's journal.

        `save_every`: videos between two forced writes to disk, which survive even a crash of the machine. Raises
        ValueError if another process writes the file, its identity is another, or it is not a journal.
        """
        self.path = path
        self.save_every = save_every
        self.rewards: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._file = stack.enter_context(open(path, "a+b"))
            _lock(self._file)
            if overwrite:
                self._file.truncate(0)
            self._begin(json.loads(json.dumps(identity)))
            stack.pop_all()

    def _begin(self, identity: dict) -> None:
        """Read what is there, up to a torn line, which is cut off."""
        offset = self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n") and (first.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(first)):
            self._file.truncate(0)  # new, or killed in its first line
            self._write({"identity": identity})
            return
        try:
            self._require_same(json.loads(first)["identity"], identity)
            while True:
                offset = self._file.tell()
                line = self._file.readline()
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                self.rewards[entry["name"]] = entry["reward"]
                self._offsets[entry["name"]] = offset
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            message = f"{self.path} is not a journal of rewards. Choose another output, or --overwrite."
            raise ValueError(message) from error
        self._file.truncate(offset)

    def _require_same(self, found: Mapping[str, object], identity: Mapping[str, object]) -> None:
        changed = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
        if changed:
            values = ", ".join(f"{name} ({found.get(name)!r} there, {identity.get(name)!r} now)" for name in changed)
            raise ValueError(
                f"{self.path} holds the rewards of another run, with another {values}. Choose another output, or "
                "start clean with --overwrite."
            )

    def add(self, outcome: Outcome) -> None:
        """Record an outcome."""
        if isinstance(outcome, FailedVideo):
            self.failures[outcome.name] = outcome.error
            return
        assert outcome.name not in self.rewards, f"{outcome.name} was scored twice"
        self._offsets[outcome.name] = self._file.seek(0, os.SEEK_END)
        names = ("name", "reward", "num_tokens", "is_finished", "cot")
        several = {"standard_error": outcome.standard_error, "thoughts": list(map(asdict, outcome.thoughts))}
        self._write({name: getattr(outcome, name) for name in names} | (several if outcome.thoughts else {}))
        self.rewards[outcome.name] = outcome.reward
        if len(self.rewards) % self.save_every == 0:
            os.fsync(self._file.fileno())

    def read(self, name: str) -> ScoredVideo:
        """A scored video from disk, chains of thought included."""
        self._file.seek(self._offsets[name])
        entry = json.loads(self._file.readline())
        thoughts = tuple(Thought(**thought) for thought in entry.pop("thoughts", ()))
        return ScoredVideo(**entry, thoughts=thoughts)

    def _write(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Force everything to disk and release the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: BinaryIO) -> None:
    """Raise ValueError if another process holds the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{file.name} is being written by another run. Wait for it, or choose another output."
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): do not start a second run with it", file.name, error)
