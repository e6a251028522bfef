"""When training logs, evaluates and saves; what it logs, and where."""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arguments import TrainingArguments
from losses import compute_means
from model_qwen3 import quiet_libraries
from utils import get_rank

LOG_FILE = "train_log.jsonl"
OUR_LOGGERS = ("trainer_qwen3", "run_folder", "checkpoint", "descore")


def setup_logging() -> None:
    """Log to stderr: our INFO messages on rank 0, only warnings on the others."""
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for name in OUR_LOGGERS if get_rank() == 0 else ():
        logging.getLogger(name).setLevel(logging.INFO)


@dataclass(frozen=True)
class Schedule:
    """Length of the training and its intervals, in optimizer steps."""

    steps_per_epoch: int
    num_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int

    @classmethod
    def build(cls, num_pairs: int, pairs_per_step: int, arguments: TrainingArguments) -> "Schedule":
        steps_per_epoch = math.ceil(num_pairs / pairs_per_step)
        num_steps = max(1, round(arguments.num_train_epochs * steps_per_epoch))
        if arguments.max_steps > 0:
            num_steps = min(num_steps, arguments.max_steps)
        intervals = (arguments.logging_epochs, arguments.eval_epochs, arguments.save_epochs)
        return cls(steps_per_epoch, num_steps, *(max(1, round(epochs * steps_per_epoch)) for epochs in intervals))

    def is_due(self, step: int, interval: int) -> bool:
        """Whether something with this interval is due after `step`; after the last step everything is."""
        return step % interval == 0 or step == self.num_steps


class LogWindow:
    """Sums since the last log line, turned into means over pairs and steps."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | float = 0.0
        self.grad_norms: list[float] = []
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step: evaluation and saving are not training."""
        self.clock = time.perf_counter()

    def add(self, sums: torch.Tensor, *, grad_norm: float) -> None:
        """Add a step's `compute_pair_sums` over all ranks, and its gradient norm."""
        self.sums = self.sums + sums
        self.grad_norms.append(grad_norm)
        self.seconds += time.perf_counter() - self.clock
        self.restart_clock()

    def means(self, dimensions: Sequence[str]) -> dict[str, float]:
        """Means over the window."""
        values = compute_means(self.sums, dimensions)
        values["grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        values["seconds_per_step"] = self.seconds / len(self.grad_norms)
        values["pairs_per_second"] = float(self.sums[1]) / self.seconds
        return values


class Tracker:
    """Writes scalars to `train_log.jsonl` and to tensorboard or wandb, on rank 0 only."""

    def __init__(self, folder: Path, *, report_to: str, run_name: str | None, config: dict, start_step: int) -> None:
        """Open the logs in `folder`; drop what an interrupted run logged after `start_step`."""
        self._file = self._writer = self._run = None
        if get_rank() != 0:
            return
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
        for log in filter(None, (self._file, self._writer)):
            log.close()
        if self._run is not None:
            self._run.finish()


def _step_of(line: str) -> float:
    """The optimizer step of a log line; infinity for a torn line, as a killed run may leave."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
