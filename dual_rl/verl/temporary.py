"""Temporary folders that do not outlive their process, however it ends.

The process holds a lock on a file in each of its folders, and the kernel releases the lock when the process is gone. A
killed process cannot clean up, so every use of such a folder also removes those whose lock is free.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "descore_"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A folder `descore_KIND_XXXX` in the temporary directory, removed at the end of the block or of the process."""
    remove_abandoned_folders()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{kind}_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with open(folder / "new", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK_FILE)  # under this name it was never unlocked
            yield folder


def remove_abandoned_folders() -> None:
    """Remove this user's folders whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # no such folder (any more), no lock file, or another process has the lock
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with open(folder / LOCK_FILE) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
