"""Metrics of a step by hand, and loggers: what arrives where, and what a resumed run finds there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model_support import DUAL_RL, make_pair, make_response
from verl.config import Config
from verl.trainer.metrics import group_metrics, pair_metrics, response_metrics, reward_metrics
from verl.trainer.tracking import Tracker
from verl.types import ResponseKey

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
        tracker.log({"value": float(step + 100 * start_step), "nan": math.nan}, step)
        tracker.log_generations([GENERATION], step)
    tracker.close()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_file_and_tensorboard_show_a_resumed_run_as_one_curve(tmp_path):
    """They drop what came after the checkpoint that it resumed from."""
    config = make_config(tmp_path, "file", "tensorboard")
    write_steps(config, 0, range(6))
    assert read_lines(tmp_path / "train_log.jsonl")[0] == {"step": 0, "value": 0.0, "nan": None}
    assert read_lines(tmp_path / "generations.jsonl")[0] == {"step": 0, **GENERATION}
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "value')  # cut short by a kill
    write_steps(config, 3, range(4, 6))
    assert [(line["step"], line["value"]) for line in read_lines(tmp_path / "train_log.jsonl")] == RESUMED
    assert [line["step"] for line in read_lines(tmp_path / "generations.jsonl")] == [0, 1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("value")] == RESUMED
    assert "generations/0/text_summary" in events.Tags()["tensors"]


def test_console_shows_a_line_per_step(tmp_path, capsys):
    tracker = Tracker(make_config(tmp_path, "console"), 2, num_steps=8)
    tracker.log({"reward/overall/mean": 0.61234567, "bt/loss": 0.69, "other": 1.0, "timing/seconds/step": 34.1}, 3)
    tracker.close()
    assert capsys.readouterr().out == "step 3/8  reward 0.6123  bt 0.69  seconds 34.1\n"


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


def test_rewards_are_averaged_by_name():
    rewards = {
        ResponseKey(0, "A", 0): {"overall": 0.2, "sub": 1.0},
        ResponseKey(0, "A", 1): {"overall": 0.6, "sub": 0.0, "rare": 3.0},
        ResponseKey(0, "B", 0): {"overall": 0.4, "sub": 0.5},
    }
    expected = {"overall/mean": 0.4, "overall/std": (0.08 / 3) ** 0.5, "overall/min": 0.2, "overall/max": 0.6}
    expected |= {"sub/mean": 0.5, "rare/mean": 3.0}
    found = reward_metrics(rewards, prefix="val/reward")
    assert found == pytest.approx({f"val/reward/{name}": value for name, value in expected.items()})


def test_groups_of_equal_scores_and_cut_responses_are_counted():
    scores = {(0, "A"): (1.0, 1.0), (0, "B"): (0.0, 1.0), (1, "A"): (0.3, 0.3), (1, "B"): (0.0, 0.0)}
    by_response = {ResponseKey(*video, i): score for video, group in scores.items() for i, score in enumerate(group)}
    assert group_metrics(by_response) == pytest.approx({"group/zero_variance": 0.75, "group/std": 0.5**0.5 / 4})
    responses = [make_response(ResponseKey(0, "A", i), n, is_finished=n < 9) for i, n in enumerate((3, 9, 0, 4))]
    expected = {"mean": 4.0, "max": 9.0, "min": 0.0, "clip_ratio": 0.25}  # EOS is left out
    assert response_metrics(responses) == {f"response_length/{name}": value for name, value in expected.items()}


def test_pair_accuracy_is_strict_leaves_ties_out_and_averages_over_responses():
    preferences = [1, -1, 1, 0, None, -1]
    rewards = [((0.0, 4.0), (1.0, 1.0)), (2.0, 1.0), (1.0, 1.0), (9.0, 0.0), (9.0, 0.0), (-1.0, 3.0)]
    head_rewards = {
        ResponseKey(index, side, sample): reward
        for index, both in enumerate(rewards)
        for side, of_side in zip("AB", both, strict=True)
        for sample, reward in enumerate(of_side if isinstance(of_side, tuple) else (of_side,))
    }
    pairs = [make_pair(index, preference) for index, preference in enumerate(preferences)]
    margins = (-1, 3, -1, 0, 4)  # of the decided pairs' responses
    expected = {
        "val/num_decided_pairs": 4.0,
        "val/gsb_acc": 0.5,
        "val/reward_margin": (1 - 1 + 0 + 4) / 4,
        "val/bt_loss": sum(math.log(1 + math.exp(-margin)) for margin in margins) / 5,
    }
    assert pair_metrics(pairs, head_rewards) == pytest.approx(expected)
    assert pair_metrics(pairs[::-1], dict(reversed(head_rewards.items()))) == pytest.approx(expected)
    assert pair_metrics(pairs[3:5], {}) == {"val/num_decided_pairs": 0.0}
