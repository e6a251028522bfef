"""When training logs, evaluates and saves, and the means that it logs."""

import math
import time
from dataclasses import dataclass

import torch

from arguments import TrainingArguments
from losses import PairMetrics


@dataclass(frozen=True)
class Schedule:
    """When things happen, in optimizer steps."""

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

        def every(epochs: float) -> int:
            return max(1, round(epochs * steps_per_epoch))

        return cls(
            steps_per_epoch=steps_per_epoch,
            num_steps=num_steps,
            logging_steps=every(arguments.logging_epochs),
            eval_steps=every(arguments.eval_epochs),
            save_steps=every(arguments.save_epochs),
        )


class LogWindow:
    """Sums since the last log line, turned into means over pairs and steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.num_pairs = 0.0
        self.grad_norms: list[float] = []
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last step: evaluation and saving are not training."""
        self.clock = time.perf_counter()

    def add(self, sums: torch.Tensor, *, num_pairs: float, grad_norm: float) -> None:
        self.sums += sums
        self.num_pairs += num_pairs
        self.grad_norms.append(grad_norm)
        self.seconds += time.perf_counter() - self.clock
        self.restart_clock()

    def means(self) -> dict[str, float]:
        """Means since the last call, which starts a new window."""
        loss_sum, *pair_sums = self.sums.tolist()
        values = {"loss": loss_sum / max(self.num_pairs, 1.0), **PairMetrics(*pair_sums).means()}
        values["grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        values["seconds_per_step"] = self.seconds / len(self.grad_norms)
        values["pairs_per_second"] = self.num_pairs / self.seconds
        self._reset()
        return values
