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

from verl.config import Config
from verl.trainer.tracking import GenerationSample, Tracker
from verl.types import ResponseKey

STAGE_DIR = Path(__file__).resolve().parents[1]
SAMPLES = [
    GenerationSample(
        key=ResponseKey(7, "B", 0),
        prompt="Judge this.",
        response="I see a red\ncircle. \u2028 " + "It moves. " * 30,
        rewards={"overall": 0.75, "format": 1.0},
        head_reward=-0.5,
        answer="A",
    ),
    GenerationSample(ResponseKey(8, "A", 0), "Judge that.", "short", {"overall": 0.0}, None, "same"),
]


@pytest.fixture
def config(tmp_path) -> Config:
    config = Config()
    config.trainer.save_checkpoint_path = str(tmp_path)
    config.trainer.experiment_name = "exp"
    config.trainer.logger = ["file"]
    return config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_steps(config: Config, start_step: int, steps: range) -> None:
    tracker = Tracker(config, start_step)
    for step in steps:
        tracker.log({"value": float(step + 100 * start_step)}, step)
        tracker.log_generations(SAMPLES[:1], step)
    tracker.close()


def test_file_holds_one_line_for_each_call(config, tmp_path):
    tracker = Tracker(config, 0)
    tracker.log({"a": 1.5, "b": float("nan"), "c": float("inf")}, 1)
    tracker.log({"val/gsb_acc": 0.5}, 1)
    tracker.log_generations(SAMPLES, 1)
    tracker.log_generations([], 2)
    tracker.close()
    assert lines(tmp_path / "train_log.jsonl") == [
        {"step": 1, "a": 1.5, "b": None, "c": None},
        {"step": 1, "val/gsb_acc": 0.5},
    ]
    first, second = lines(tmp_path / "generations.jsonl")
    assert first == {
        "step": 1,
        "pair_id": 7,
        "side": "B",
        "sample": 0,
        "reward/overall": 0.75,
        "reward/format": 1.0,
        "prompt": "Judge this.",
        "response": SAMPLES[0].response,
        "head_reward": -0.5,
        "answer": "A",
    }
    assert (second["pair_id"], second["head_reward"]) == (8, None)


def test_file_drops_what_came_after_the_checkpoint_resumed_from(config, tmp_path):
    write_steps(config, 0, range(6))
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "value')  # cut short by a kill
    write_steps(config, 3, range(4, 6))
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 304.0), (5, 305.0)]
    assert [(line["step"], line["value"]) for line in lines(tmp_path / "train_log.jsonl")] == expected
    assert [line["step"] for line in lines(tmp_path / "generations.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_tensorboard_shows_a_resumed_run_as_one_curve(config, tmp_path):
    config.trainer.logger = ["tensorboard"]
    write_steps(config, 0, range(6))
    write_steps(config, 3, range(4, 6))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("value")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 304.0), (5, 305.0)]
    assert "generations/0/text_summary" in events.Tags()["tensors"]


def test_console_line_and_table_are_readable(config, capsys):
    config.trainer.logger = ["console"]
    tracker = Tracker(config, 0, num_steps=8)
    tracker.show_phase("generate")
    tracker.log({"reward/overall/mean": 0.61234567, "bt/loss": 0.69, "unknown": 1.0, "timing/seconds/step": 34.12}, 2)
    tracker.log_generations(SAMPLES, 2)
    tracker.close()
    tracker.close()
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "step 2/8  reward 0.6123  bt 0.69  seconds 34.12"
    assert output[1] == "generations of step 2:"
    assert output[3].startswith("  7     B     0.750    -0.500   I see a red circle. It moves.")
    assert output[3].endswith(" ...")
    assert output[4] == "  8     A     0.000    -        short"


def test_a_terminal_shows_a_bar_with_the_step_and_the_phase(config, monkeypatch):
    """Standard error is a pseudo-terminal, as it is for a user who watches."""
    config.trainer.logger = ["console"]
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        tracker = Tracker(config, 2, num_steps=5)
        tracker.log({}, 3)
        tracker.show_phase("generate")
        tracker.close()
    shown = b""
    with contextlib.suppress(OSError):  # which is how a pseudo-terminal ends
        while chunk := os.read(reader, 65536):
            shown += chunk
    os.close(reader)
    shown = shown.decode()
    assert "2/5" in shown
    assert "3/5" in shown
    assert "generate" in shown


WANDB_PROGRAM = """
import sys
from verl.config import Config
from verl.trainer.tracking import GenerationSample, Tracker
from verl.types import ResponseKey

config = Config()
config.trainer.save_checkpoint_path = sys.argv[1]
config.trainer.logger = ["console", "file"]
Tracker(config, 0).close()
assert not {"wandb", "tensorboard"} & set(sys.modules), "imported without being asked for"

config.trainer.logger = ["wandb"]
sample = GenerationSample(ResponseKey(0, "A", 0), "p", "r", {"overall": 1.0}, 0.5, "A")
for start in (0, 2):
    tracker = Tracker(config, start)
    tracker.log({"value": 1.0}, start + 1)
    tracker.log_generations([sample], start + 1)
    tracker.close()
"""


def test_wandb_works_offline_and_a_resumed_run_keeps_its_identity(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(STAGE_DIR), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)], env=environment, check=True)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_run_id").read_text()
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    tables = [path.read_text() for path in (tmp_path / "wandb").rglob("*.table.json")]
    assert tables
    assert all("reward/overall" in table for table in tables)
