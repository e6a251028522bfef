"""Logging, experiment tracking and small helpers of the training script."""

import itertools
import json
import logging
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

LOG_FILE = "train_log.jsonl"
SECONDS_FOR_ERRORS = 10.0
"""How long an error waits for the other ranks, which may have raised the same one."""
SECONDS_BETWEEN_LOOKS = 0.2
LAUNCHER_NAMES = ("deepspeed.launcher", "deepspeed/launcher", "bin/deepspeed")
_exchanges = itertools.count()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, made without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def exchange(value: str) -> list[str]:
    """The value of every rank, in order of rank, on every rank.

    Ranks may come here hours apart: they look at the process group's store now and then, and nobody waits in a
    collective, whose time-out would end the run.
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
    """Run `work`, however long it takes, on rank 0 while the others wait. Its ValueError is raised on every rank."""
    message = ""
    if is_main_process():
        try:
            work()
        except ValueError as error:
            message = str(error)
    message = exchange(message)[0]
    if message:
        raise ValueError(message)


def quiet_libraries() -> None:
    """Only errors from transformers, and no progress bar while it loads weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def setup_logging() -> None:
    """Log to stderr: everything of ours on the main process, warnings only on the others."""
    quiet_libraries()
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("trainer_qwen3", "preflight", "checkpoint", "descore"):
        logging.getLogger(name).setLevel(level)


def end_with_launcher() -> None:
    """End this process when a DeepSpeed launcher above it dies, which can no longer tell its ranks to end."""
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


def report_error(error: Exception, *, seconds: float = SECONDS_FOR_ERRORS) -> None:
    """Write an error to stderr, with its rank where that is not 0: once where several ranks raise the same.

    No rank may wait for all others in a collective here: those that have no error are in another one.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    message, wait = str(error), timedelta(seconds=seconds)
    if rank == 0:
        sys.stderr.write(f"error: {message}\n")
    if world_size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    shown = None
    try:
        if rank == 0:  # whose end closes the store
            store.set("error", message)
            store.wait([f"error read by {other}" for other in range(1, world_size)], wait)
            return
        store.wait(["error"], wait)
        shown = store.get("error").decode()
        store.set(f"error read by {rank}", "")
    except dist.DistError:  # the others have no error, or are gone
        pass
    if rank != 0 and shown != message:
        sys.stderr.write(f"error on rank {rank}: {message}\n")


class Tracker:
    """Writes scalars to `train_log.jsonl` and to tensorboard or wandb, on the main process only."""

    def __init__(self, folder: Path, *, report_to: str, run_name: str | None, config: dict, start_step: int) -> None:
        """Open the logs in `folder`; what an interrupted run logged after `start_step` is dropped."""
        self._file = self._writer = self._run = None
        if not is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= start_step))
        self._file = path.open("a", buffering=1)
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "runs"), purge_step=start_step + 1)
        elif report_to == "wandb":
            import wandb

            self._run = wandb.init(project="descore", name=run_name or folder.name, dir=str(folder), config=config)

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Record scalars of one optimizer step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _step_of(line: str) -> float:
    """The optimizer step of a log line; infinity for a line that a killed run left half written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: object) -> list:
    """The value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def get_random_state() -> dict[str, torch.Tensor]:
    """States of torch's generators on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `get_random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
