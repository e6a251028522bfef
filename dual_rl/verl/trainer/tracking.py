"""Sends a run's numbers and sample generations to the loggers it asks for: console, file, tensorboard, wandb."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from verl.config import Config
from verl.trainer.sinks import ConsoleSink, FileSink, Sink, TensorboardSink, WandbSink
from verl.types import ResponseKey


@dataclass(frozen=True)
class GenerationSample:
    """One generation for people to read.

    `prompt`: the problem; `response`: decoded text without special tokens; `rewards`: what the reward function gave,
    by name; `head_reward`: the head's reward, if it was read; `answer`: the annotation.
    """

    key: ResponseKey
    prompt: str
    response: str
    rewards: Mapping[str, float]
    head_reward: float | None
    answer: str

    def row(self, step: int) -> dict[str, Any]:
        """The sample as one flat record."""
        fields = asdict(self)
        key: ResponseKey = fields.pop("key")
        rewards = fields.pop("rewards")
        return {
            "step": step,
            "pair_id": key.pair_id,
            "side": key.side,
            "sample": key.sample,
            **{f"reward/{name}": value for name, value in rewards.items()},
            **fields,
        }


class Tracker:
    """Sends metrics to every logger in `trainer.logger`. One process, the driver, has one."""

    def __init__(self, config: Config, start_step: int, *, num_steps: int | None = None) -> None:
        """`start_step`: the step resumed from, 0 for a fresh run, which drops what an earlier one logged.

        `num_steps`: the last step of the run, for the progress bar.
        """
        folder = config.trainer.output_folder
        folder.mkdir(parents=True, exist_ok=True)
        builders: dict[str, Callable[[], Sink]] = {
            "console": lambda: ConsoleSink(start_step, num_steps),
            "file": lambda: FileSink(folder, start_step),
            "tensorboard": lambda: TensorboardSink(folder, start_step, config),
            "wandb": lambda: WandbSink(folder, start_step, config),
        }
        self._sinks = [builders[name]() for name in dict.fromkeys(config.trainer.logger)]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of a step; a step may be logged in several parts."""
        for sink in self._sinks:
            sink.log(metrics, step)

    def log_generations(self, samples: Sequence[GenerationSample], step: int) -> None:
        """Log a table of generations."""
        rows = [sample.row(step) for sample in samples]
        for sink in self._sinks if rows else ():
            sink.log_generations(rows, step)

    def show_phase(self, phase: str) -> None:
        """Show on the console's progress bar what the run is doing now."""
        for sink in self._sinks:
            sink.show_phase(phase)

    def close(self) -> None:
        """Flush and close everything; may be called twice."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
        self._sinks = []
