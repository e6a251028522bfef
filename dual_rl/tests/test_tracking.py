"""Loggers: what arrives where, and what a resumed run finds there."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model_support import DUAL_RL
from verl.config import Config
from verl.trainer.tracking import Tracker

GENERATION = {
    "pair_id": 7,
    "side": "B",
    "sample": 0,
    "reward/overall": 0.75,
    "prompt": "Judge this.",
    "response": "I see a red\ncircle. \u2028 " + "It moves. " * 30,
    "head_reward": -0.5,
    "answer": "A",
}
RESUMED = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 304.0), (5, 305.0)]
"""Step and value of a run of six steps, resumed from the third, that logs 100 times its start with each step."""


def make_config(folder: Path, *loggers: str) -> Config:
    config = Config()
    config.trainer.save_checkpoint_path, config.trainer.logger = str(folder), list(loggers)
    return config


def write_steps(config: Config, start_step: int, steps: range) -> None:
    tracker = Tracker(config, start_step)
    for step in steps:
        tracker.log({"value": float(step + 100 * start_step)}, step)
        tracker.log_generations([GENERATION], step)
    tracker.close()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_file_has_one_line_per_call_and_no_invalid_json(tmp_path):
    tracker = Tracker(make_config(tmp_path, "file"), 0)
    tracker.log({"a": 1.5, "b": float("nan"), "c": float("inf")}, 1)
    tracker.log({"val/gsb_acc": 0.5}, 1)
    tracker.log_generations([GENERATION], 1)
    tracker.close()
    assert read_lines(tmp_path / "train_log.jsonl") == [
        {"step": 1, "a": 1.5, "b": None, "c": None},
        {"step": 1, "val/gsb_acc": 0.5},
    ]
    assert read_lines(tmp_path / "generations.jsonl") == [{"step": 1, **GENERATION}]


def test_file_and_tensorboard_show_a_resumed_run_as_one_curve(tmp_path):
    """They drop what came after the checkpoint that it resumed from."""
    config = make_config(tmp_path, "file", "tensorboard")
    write_steps(config, 0, range(6))
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "value')  # cut short by a kill
    write_steps(config, 3, range(4, 6))
    assert [(line["step"], line["value"]) for line in read_lines(tmp_path / "train_log.jsonl")] == RESUMED
    assert [line["step"] for line in read_lines(tmp_path / "generations.jsonl")] == [0, 1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("value")] == RESUMED
    assert "generations/0/text_summary" in events.Tags()["tensors"]


def test_console_shows_a_line_per_step_a_table_and_on_a_terminal_a_bar(tmp_path, monkeypatch, capsys):
    """Standard error is a pseudo-terminal, as it is for a user who watches."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        tracker = Tracker(make_config(tmp_path, "console"), 2, num_steps=8)
        tracker.show_phase("generate")
        tracker.log({"reward/overall/mean": 0.61234567, "bt/loss": 0.69, "other": 1.0, "timing/seconds/step": 34.1}, 3)
        tracker.log_generations([GENERATION], 3)
        tracker.close()
    shown = b""
    with contextlib.suppress(OSError):  # a pseudo-terminal's end
        while chunk := os.read(reader, 65536):
            shown += chunk
    os.close(reader)
    for words in (b"2/8", b"3/8", b"generate"):
        assert words in shown
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "step 3/8  reward 0.6123  bt 0.69  seconds 34.1"
    assert output[1] == "generations of step 3:"
    assert output[3].startswith("  7     B     0.750    -0.500   I see a red circle. It moves.")
    assert output[3].endswith(" ...")


WANDB_PROGRAM = """
import sys
from pathlib import Path
from test_tracking import make_config, write_steps

write_steps(make_config(Path(sys.argv[1]), "wandb"), 0, range(2))
write_steps(make_config(Path(sys.argv[1]), "wandb"), 2, range(3, 5))
"""


@pytest.mark.slow
def test_wandb_works_offline_and_a_resumed_run_keeps_its_identity(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{DUAL_RL}:{DUAL_RL / 'tests'}"}
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)], env=environment, check=True)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_run_id").read_text()
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    tables = [path.read_text() for path in (tmp_path / "wandb").rglob("*.table.json")]
    assert tables
    assert all("reward/overall" in table for table in tables)
