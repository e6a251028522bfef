"""What a run has scored so far: one JSON line a video, written the moment it is known.

A killed run leaves a journal of whole lines and at most one torn one, which is dropped; the next run scores what is
missing. Its first line says what the rewards depend on, so that those of another run are never mixed in. Failures are
listed, not kept: a video that was repaired meanwhile is tried again.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from scoring.scoring import FailedVideo, Outcome, ScoredVideo

logger = logging.getLogger(__name__)

FIRST_BYTES = b'{"identity": '
"""How a journal begins."""


class Journal:
    """The open journal of this run. Close it, or use it as a context manager.

    `rewards`: by task name, of this run and the ones before it. Chains of thought stay on disk: `read`.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], *, overwrite: bool = False, save_every: int = 100):
        """Open or begin. `identity`: what rewards depend on, JSON values. `overwrite`: drop another run's journal.

        `save_every`: videos after which the file is forced to disk, for what even a crash of the machine must not
        take. Raises ValueError when another process writes it, or its identity is not this one.
        """
        self.path = path
        self.save_every = save_every
        self.rewards: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._places: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115, closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"{path} is being written by another run: wait for it, or choose another output"
            ) from error
        except OSError as error:  # some network file systems know no locks
            logger.warning("%s cannot be locked (%s): start no second run with it", path, error)
        try:
            self._begin(json.loads(json.dumps(identity)), overwrite)
        except ValueError:
            self._file.close()
            raise

    def _begin(self, identity: dict, overwrite: bool) -> None:
        if overwrite:
            self._file.truncate(0)
        self._file.seek(0)
        first = self._file.readline()
        is_torn = not first.endswith(b"\n")
        if is_torn and not (first.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(first)):
            self._refuse()
        if is_torn:  # new, or killed in its first line
            self._file.truncate(0)
            self._write({"identity": identity})
            return
        self._require_same(self._parse(first).get("identity", {}), identity)
        while True:
            place = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                return
            entry = self._parse(line)
            if "name" not in entry:
                self._refuse()
            self.rewards[entry["name"]] = entry["reward"]
            self._places[entry["name"]] = place

    def _parse(self, line: bytes) -> dict:
        try:
            entry = json.loads(line)
        except ValueError as error:
            self._refuse(error)
        return entry if isinstance(entry, dict) else {}

    def _refuse(self, cause: Exception | None = None) -> NoReturn:
        raise ValueError(f"{self.path} is no journal of rewards: choose another output, or --overwrite") from cause

    def _require_same(self, found: Mapping[str, object], identity: Mapping[str, object]) -> None:
        changed = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
        if changed:
            differences = ", ".join(
                f"{name} ({found.get(name)!r} there, {identity.get(name)!r} now)" for name in changed
            )
            raise ValueError(
                f"{self.path} holds the rewards of another run, with another {differences}: choose another output, or "
                "start clean with --overwrite"
            )

    def add(self, outcome: Outcome) -> None:
        """Note what became of a video."""
        if isinstance(outcome, FailedVideo):
            self.failures[outcome.name] = outcome.error
            return
        assert outcome.name not in self.rewards, f"{outcome.name} was scored twice"
        self._places[outcome.name] = self._file.seek(0, os.SEEK_END)
        self._write(
            {
                "name": outcome.name,
                "reward": outcome.reward,
                "num_tokens": outcome.num_tokens,
                "is_finished": outcome.is_finished,
                "cot": outcome.cot,
            }
        )
        self.rewards[outcome.name] = outcome.reward
        if len(self.rewards) % self.save_every == 0:
            os.fsync(self._file.fileno())

    def read(self, name: str) -> ScoredVideo:
        """A scored video, chain of thought included, from disk."""
        self._file.seek(self._places[name])
        return ScoredVideo(**json.loads(self._file.readline()))

    def _write(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Force everything to disk and let go of the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
