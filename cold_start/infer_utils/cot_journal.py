"""What a run has sampled so far: one JSON line a chain of thought (CoT), written the moment it is there.

A killed run leaves whole lines and at most one torn one, which is dropped; the next run samples what is missing. The
first line says what the samples depend on, so that those of another run are never mixed in. Failures are not kept: a
video that was repaired meanwhile is tried again.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

logger = logging.getLogger(__name__)

FIRST_BYTES = b'{"identity": '
"""How a journal begins."""
SYNC_EVERY = 100
"""Samples between two moments at which the file is forced to disk, for what even a crash of the machine spares."""


class SampleKey(NamedTuple):
    """Which sample: `row` of the CSV from 1, `side` A or B, and its number from 0."""

    row: int
    side: str
    sample: int


@dataclass(frozen=True)
class Sample:
    """A CoT as its generator wrote it, without EOS.

    `is_finished`: it ended by itself, not at the length limit. `num_prompt_tokens`: what the generator read before
    it, None where it does not tell.
    """

    key: SampleKey
    text: str
    is_finished: bool
    num_prompt_tokens: int | None


class CotJournal:
    """The open journal of a run. Use it as a context manager. Texts stay on disk: `read`."""

    def __init__(self, path: Path, identity: Mapping[str, object], *, overwrite: bool = False) -> None:
        """Open or begin. `identity`: what samples depend on, JSON values. `overwrite`: drop what is there.

        Raises ValueError when another process writes it, when it is no journal, and for another identity.
        """
        self.path = path
        self._places: dict[SampleKey, int] = {}
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115, closed by close()
        try:
            self._lock()
            self._begin(json.loads(json.dumps(identity)), overwrite)
        except ValueError:
            self._file.close()
            raise

    def __contains__(self, key: SampleKey) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, sample: Sample) -> None:
        """Note a sample."""
        assert sample.key not in self, f"{sample.key} was sampled twice"
        self._places[sample.key] = self._file.seek(0, os.SEEK_END)
        entry = {"is_finished": sample.is_finished, "num_prompt_tokens": sample.num_prompt_tokens, "text": sample.text}
        self._write({"key": sample.key, **entry})
        if len(self) % SYNC_EVERY == 0:
            os.fsync(self._file.fileno())

    def read(self, key: SampleKey) -> Sample:
        """A sample, from disk."""
        self._file.seek(self._places[key])
        entry = json.loads(self._file.readline())
        return Sample(**{**entry, "key": SampleKey(*entry["key"])})

    def close(self) -> None:
        """Force everything to disk and let go of the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "CotJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is being written by another run: wait for it, or choose another --output"
            ) from error
        except OSError as error:  # some network file systems know no locks
            logger.warning("%s cannot be locked (%s): start no second run with this --output", self.path, error)

    def _begin(self, identity: dict, overwrite: bool) -> None:
        if overwrite:
            self._file.truncate(0)
        self._file.seek(0)
        first = self._file.readline()
        is_whole = first.endswith(b"\n")
        if not is_whole and not (first.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(first)):
            self._refuse()
        if not is_whole:  # new, or killed in its first line
            self._file.truncate(0)
            self._write({"identity": identity})
            return
        self._require_same(self._parse(first).get("identity", {}), identity)
        for place, line in self._whole_lines():
            entry = self._parse(line)
            if "key" not in entry:
                self._refuse()
            self._places[SampleKey(*entry["key"])] = place

    def _whole_lines(self) -> Iterator[tuple[int, bytes]]:
        """Place and content of the lines that follow; a torn last one is cut off the file."""
        while True:
            place = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                return
            yield place, line

    def _parse(self, line: bytes) -> dict:
        try:
            entry = json.loads(line)
        except ValueError as error:
            self._refuse(error)
        return entry if isinstance(entry, dict) else {}

    def _refuse(self, cause: Exception | None = None) -> NoReturn:
        raise ValueError(f"{self.path} is no journal of samples: choose another --output, or --overwrite") from cause

    def _require_same(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if changed:
            differences = ", ".join(
                f"{name} ({found.get(name)!r} there, {wanted.get(name)!r} now)" for name in changed
            )
            raise ValueError(
                f"{self.path} holds the samples of another run, with another {differences}: choose another --output, "
                "or start clean with --overwrite"
            )

    def _write(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
