"""What is looked at before workers start, and in a step before anything is learned from it."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model_support import write_small_model
from verl.model.reward_files import load_checkpoint, save_head
from verl.trainer.config import AlgorithmConfig
from verl.trainer.generation import ScoredBatch
from verl.trainer.preflight import check_same_model, describe_model
from verl.trainer.trainer import DualTrainer
from verl.types import ResponseKey

PLACE = Path("results/mine/global_step_2")


def describe(folder: Path) -> dict[str, object]:
    return describe_model(str(folder), load_checkpoint(folder, with_weights=False))


@pytest.fixture
def model(tmp_path) -> Path:
    write_small_model(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_the_same_wherever_it_lies(model, tmp_path):
    before = describe(model)
    shutil.copytree(model, tmp_path / "moved")
    check_same_model(before, describe(tmp_path / "moved"), checkpoint=PLACE)
    check_same_model(None, before, checkpoint=PLACE)  # of a checkpoint that does not say


def test_another_model_is_refused_and_what_differs_is_named(model):
    before, checkpoint = describe(model), load_checkpoint(model, with_weights=False)
    save_head(model / "rm_head.pth", torch.ones_like(checkpoint.head_weight))
    other = replace(checkpoint, video_budget=checkpoint.video_budget.replace(fps=1.0))
    with pytest.raises(ValueError, match=r"global_step_2 was trained from another model \(other weights\) than"):
        check_same_model(before, describe(model), checkpoint=PLACE)
    with pytest.raises(ValueError, match=r"\(other frames\)"):
        check_same_model(before, describe_model(str(model), other), checkpoint=PLACE)


def test_a_filter_key_that_no_reward_has_is_named():
    rewards = {ResponseKey(0, side, 0): {"overall": 1.0, "format": 1.0} for side in "AB"}
    settings = AlgorithmConfig(online_filtering=True, filter_key="overal")
    trainer = SimpleNamespace(config=SimpleNamespace(algorithm=settings))
    message = r"filter_key=overal: .* does not return it for every response; choose one of format, overall"
    with pytest.raises(ValueError, match=message):
        DualTrainer._filter(trainer, ScoredBatch((), rewards))
