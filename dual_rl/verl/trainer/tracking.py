"""Sends a run's metrics and sample generations to its loggers: console, file, tensorboard, wandb.

A resumed run continues each of them without a break: what was logged after the checkpoint is dropped.
"""

import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.config import Config
from verl.config_loading import to_yaml
from verl.trainer.checkpoints import write_atomically

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
"""Metrics on the console's line, by label."""

Metrics = Mapping[str, float]
Generation = Mapping[str, Any]
"""A response as one flat record: step, pair_id, side, sample, reward/NAME, prompt, response, head_reward, answer."""


class ConsoleLogger:
    """A progress bar on a terminal, and one line per call of `log`; elsewhere also the phases of the first step."""

    def __init__(self, config: Config, start_step: int, num_steps: int | None) -> None:
        self.start_step, self.num_steps = start_step, num_steps
        self.bar = tqdm(total=num_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)
        self.has_logged_step = False

    def log(self, metrics: Metrics, step: int) -> None:
        shown = [f"{label} {metrics[name]:.4g}" for label, name in HEADLINE.items() if name in metrics]
        of_all = f"/{self.num_steps}" if self.num_steps else ""
        tqdm.write(f"step {step}{of_all}  {'  '.join(shown)}".rstrip(), file=sys.stdout)
        sys.stdout.flush()
        self.bar.update(max(0, step - self.bar.n))
        self.has_logged_step = step > self.start_step

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Nothing: they are too long for a console."""

    def show_phase(self, phase: str) -> None:
        self.bar.set_postfix_str(phase)
        if self.bar.disable and not self.has_logged_step:
            sys.stdout.write(f"  {phase} ...\n")
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


class FileLogger:
    """`train_log.jsonl` with one {"step", metric: value, ...} per line, `generations.jsonl` with one response."""

    def __init__(self, config: Config, start_step: int, num_steps: int | None) -> None:
        folder = config.trainer.output_folder
        self.metrics_path, self.generations_path = folder / "train_log.jsonl", folder / "generations.jsonl"
        for path in (self.metrics_path, self.generations_path):
            _drop_lines_after(path, start_step)

    def log(self, metrics: Metrics, step: int) -> None:
        self._append(self.metrics_path, [{"step": step, **metrics}])

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        self._append(self.generations_path, rows)

    def close(self) -> None:
        """Nothing is held open."""

    @staticmethod
    def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        with path.open("a", encoding="utf-8") as file:
            for record in records:  # JSON has no NaN
                finite = {name: None if _is_infinite(value) else value for name, value in record.items()}
                file.write(json.dumps(finite, ensure_ascii=False) + "\n")


class TensorboardLogger:
    """Event files in `tensorboard/`."""

    def __init__(self, config: Config, start_step: int, num_steps: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.trainer.output_folder / "tensorboard"
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}```", start_step)

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        for index, row in enumerate(rows):
            self.writer.add_text(f"generations/{index}", f"```json\n{json.dumps(row, indent=2)}\n```", step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A wandb run, which a resumed training continues; wandb ignores the steps that it already has.

    wandb reads its own environment variables, e.g. WANDB_MODE=offline.
    """

    def __init__(self, config: Config, start_step: int, num_steps: int | None) -> None:
        import wandb

        folder = config.trainer.output_folder
        id_file = folder / "wandb_run_id"
        run_id = id_file.read_text().strip() if start_step and id_file.is_file() else uuid.uuid4().hex
        id_file.write_text(run_id)
        self.make_table = wandb.Table
        self.run = wandb.init(
            project=config.trainer.project_name,
            name=config.trainer.experiment_name,
            config=asdict(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        table = self.make_table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"generations": table}, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"console": ConsoleLogger, "file": FileLogger, "tensorboard": TensorboardLogger, "wandb": WandbLogger}


class Tracker:
    """All loggers of `trainer.logger` as one. `start_step`: the step resumed from, 0 for a new run."""

    def __init__(self, config: Config, start_step: int, num_steps: int | None = None) -> None:
        config.trainer.output_folder.mkdir(parents=True, exist_ok=True)
        self._loggers = [LOGGERS[name](config, start_step, num_steps) for name in dict.fromkeys(config.trainer.logger)]

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log a table of generations, which all have the fields of `Generation` but the step."""
        for logger in self._loggers if rows else ():
            logger.log_generations([{"step": step, **row} for row in rows], step)

    def show_phase(self, phase: str) -> None:
        """Show on the progress bar what the run is doing."""
        for logger in self._loggers:
            if isinstance(logger, ConsoleLogger):
                logger.show_phase(phase)

    def close(self) -> None:
        """Flush and close every logger, also when one of them fails."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to `step` (none for step 0); a line that a kill cut short goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with suppress(json.JSONDecodeError):
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
