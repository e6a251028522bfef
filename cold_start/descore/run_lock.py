"""One run in a folder at a time."""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

LOCK_FILE = ".lock"
SECONDS_TO_WAIT = 3
"""A killed run may take this long to end."""

logger = logging.getLogger(__name__)


def lock_folder(folder: str | os.PathLike) -> int | None:
    """Lock a folder, made if need be, until this process ends; returns the descriptor that holds the lock.

    None, with a warning, where the file system has no locks. Raises ValueError that names the process that holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # child processes do not hold it
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            holder = os.pread(descriptor, 300, 0).decode() or "another process"
            os.close(descriptor)
            message = f"{folder} is in use by {holder}; wait for it to end, or choose another folder"
            raise ValueError(message) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return descriptor
