"""Sends a run's numbers and sample generations to the loggers it asks for: console, file, tensorboard, wandb.

All of them continue cleanly: what a killed run logged after the checkpoint that is resumed from is dropped. Each
imports its library only when it is asked for.
"""

import contextlib
import json
import math
import sys
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.config import Config
from verl.config_loading import to_yaml
from verl.trainer.checkpoints import write_atomically
from verl.types import ResponseKey

HEADLINE = {
    "reward": "reward/overall/mean",
    "length": "response_length/mean",
    "cut": "response_length/clip_ratio",
    "zero_var": "group/zero_variance",
    "policy": "actor/policy_loss",
    "kl": "actor/kl",
    "entropy": "actor/entropy",
    "bt": "bt/loss",
    "bt_acc": "bt/accuracy",
    "grad": "actor/grad_norm",
    "val_reward": "val/reward/overall/mean",
    "val_acc": "val/gsb_acc",
    "seconds": "timing/seconds/step",
}
"""What the console's line shows of a step's metrics, where they are present."""
CONSOLE_RESPONSE_CHARACTERS = 96


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
        rewards = {f"reward/{name}": value for name, value in self.rewards.items()}
        texts = {"prompt": self.prompt, "response": self.response, "head_reward": self.head_reward}
        return {"step": step, **self.key._asdict(), **rewards, **texts, "answer": self.answer}


class Tracker:
    """Sends metrics to every logger in `trainer.logger`. One process, the driver, has one."""

    def __init__(self, config: Config, start_step: int, *, num_steps: int | None = None) -> None:
        """`start_step`: the step resumed from, 0 for a fresh run, which drops what an earlier one logged.

        `num_steps`: the last step of the run, for the progress bar.
        """
        folder = config.trainer.output_folder
        folder.mkdir(parents=True, exist_ok=True)
        builders = {
            "console": lambda: ConsoleSink(start_step, num_steps),
            "file": lambda: FileSink(folder, start_step),
            "tensorboard": lambda: TensorboardSink(folder, start_step, config),
            "wandb": lambda: WandbSink(folder, start_step, config),
        }
        self._sinks: list[Sink] = [builders[name]() for name in dict.fromkeys(config.trainer.logger)]

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


class Sink:
    """One place that metrics go to."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        raise NotImplementedError

    def show_phase(self, phase: str) -> None:
        """Only the console has something to show."""

    def close(self) -> None:
        """Flush and close what is open."""


class ConsoleSink(Sink):
    """A progress bar over steps on a terminal, and one line for each call of `log`."""

    def __init__(self, start_step: int, num_steps: int | None) -> None:
        self.num_steps = num_steps
        self.bar = tqdm(total=num_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        shown = [f"{label} {metrics[name]:.4g}" for label, name in HEADLINE.items() if name in metrics]
        of_all = f"/{self.num_steps}" if self.num_steps else ""
        self._write(f"step {step}{of_all}  {'  '.join(shown)}".rstrip())
        self.bar.update(max(0, step - self.bar.n))

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        lines = [f"generations of step {step}:", "  pair  side  overall  head     response"]
        for row in rows:
            response = textwrap.shorten(row["response"], CONSOLE_RESPONSE_CHARACTERS, placeholder=" ...")
            numbers = [f"{_number(row.get(name)):<7}" for name in ("reward/overall", "head_reward")]
            lines.append(f"  {row['pair_id']:<5} {row['side']:<5} {numbers[0]}  {numbers[1]}  {response}")
        self._write("\n".join(lines))

    def show_phase(self, phase: str) -> None:
        self.bar.set_postfix_str(phase)

    def close(self) -> None:
        self.bar.close()

    @staticmethod
    def _write(text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class FileSink(Sink):
    """`train_log.jsonl` with {"step", metric: value, ...} a line, and `generations.jsonl` with one sample a line."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.metrics_path = folder / "train_log.jsonl"
        self.generations_path = folder / "generations.jsonl"
        for path in (self.metrics_path, self.generations_path):
            _drop_lines_after(path, start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._append(self.metrics_path, [{"step": step, **metrics}])

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._append(self.generations_path, rows)

    @staticmethod
    def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(_finite_or_null(record), ensure_ascii=False, allow_nan=False) for record in records]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


class TensorboardSink(Sink):
    """Event files under `tensorboard/`."""

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```", start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for index, row in enumerate(rows):
            self.writer.add_text(f"generations/{index}", f"```json\n{json.dumps(row, indent=2)}\n```", step)

    def close(self) -> None:
        self.writer.close()


class WandbSink(Sink):
    """A wandb run that a resumed training continues. Steps that are run again give what is there already.

    Settings of its own come from its environment variables, e.g. WANDB_MODE=offline.
    """

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        import wandb

        self.wandb = wandb
        id_file = folder / "wandb_run_id"
        run_id = id_file.read_text().strip() if start_step and id_file.is_file() else uuid.uuid4().hex
        id_file.write_text(run_id)
        self.run = wandb.init(
            project=config.trainer.project_name,
            name=config.trainer.experiment_name,
            config=asdict(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = self.wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self.run.log({"generations": table}, step=step)

    def close(self) -> None:
        self.run.finish()


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to `step` (none for step 0); a line that a kill cut short goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def _finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
