"""The ranks of a run: exchanging values, reporting errors, ending with the launcher.

Without a process group, rank 0 is the only one.
"""

import contextlib
import itertools
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

SECONDS_FOR_ERRORS = 3.0
"""Time for the other ranks to raise the same error."""
SECONDS_BETWEEN_LOOKS = 0.2
LAUNCHER_NAMES = ("deepspeed.launcher", "deepspeed/launcher", "bin/deepspeed")
_exchanges = itertools.count()


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange(value: str) -> list[str]:
    """The values of all ranks by rank, on every rank.

    Ranks may arrive hours apart. A collective would time out, so they poll the process group's store.
    """
    if not dist.is_initialized():
        return [value]
    store, number = dist.distributed_c10d._get_default_store(), next(_exchanges)
    keys = [f"exchange {number} {rank}" for rank in range(get_world_size())]
    store.set(keys[get_rank()], value)
    while not store.check(keys):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return [store.get(key).decode() for key in keys]


def run_on_main_process(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait, however long it takes. Its ValueError is raised on every rank."""
    message = ""
    if get_rank() == 0:
        try:
            work()
        except ValueError as error:
            message = str(error)
    message = exchange(message)[0]
    if message:
        raise ValueError(message)


def report_error(error: Exception, *, seconds: float = SECONDS_FOR_ERRORS) -> None:
    """Write an error to stderr, once if several ranks raise it: the first of them writes."""
    is_first = True
    if get_world_size() > 1:
        with contextlib.suppress(dist.DistError):  # rank 0 is gone, and with it the store
            is_first = dist.distributed_c10d._get_default_store().add(f"error: {error}", 1) == 1
    if is_first:
        sys.stderr.write(f"error: {error}\n")
    if get_world_size() > 1 and get_rank() == 0:
        time.sleep(seconds)  # the store closes when this process ends


def end_with_launcher() -> None:
    """End this process when a DeepSpeed launcher among its ancestors dies: a dead launcher cannot stop its ranks."""
    launchers = []
    pid = os.getppid()
    while any(name in Path(f"/proc/{pid}/cmdline").read_text() for name in LAUNCHER_NAMES):
        launchers.append(os.pidfd_open(pid))
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def watch() -> None:
        select.select(launchers, [], [])
        os._exit(1)

    if launchers:
        threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()
