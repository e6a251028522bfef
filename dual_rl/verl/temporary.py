"""Temporary folders that do not outlive their process, however it ends.

The process holds a lock on a file in each of its folders, and the kernel releases the lock when the process is gone. A
killed process cannot clean up, so every use of such a folder also removes those whose lock is free.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

PREFIX = "descore_"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A folder `descore_KIND_XXXX` in the temporary directory, removed at the end of the block or of the process."""
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{kind}_", dir=parent))  # until it is locked
    lock = _try_lock(hidden, os.O_CREAT)
    assert lock is not None, f"another process has locked {hidden}"
    folder = hidden.rename(parent / hidden.name.removeprefix("."))
    leave = partial(_leave, folder, lock)
    atexit.register(leave)
    try:
        yield folder
    finally:
        atexit.unregister(leave)
        leave()


def _leave(folder: Path, lock: int) -> None:
    _remove(folder, lock)
    _remove_abandoned(folder.parent)  # of processes that this one has started and killed


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose process is gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # no such folder (any more), or no lock file
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _try_lock(folder)
            if lock is not None:
                _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _try_lock(folder: Path, flags: int = 0) -> int | None:
    """The descriptor that holds the folder's lock, None if another process holds it."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
