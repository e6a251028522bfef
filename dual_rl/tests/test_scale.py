"""Rewards on a known scale: kept with the model, and refused for another one."""

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from scoring.reward_model import RewardModel
from scoring.source import compute_scale, load_model_scale, read_checkpoint, save_scale
from scoring.types import ScoringSettings
from verl.model.reward_files import fingerprint, save_head

CLIPS = sorted((Path(__file__).resolve().parents[1] / "data" / "videos").glob("*.mp4"))[:4]
SETTINGS = ScoringSettings(backend="hf", batch_size=4, max_new_tokens=6)


def test_a_scale_is_mean_and_standard_deviation():
    scale = compute_scale([1.0, 2.0, 3.0], data="val.csv", weights="w", video={})
    assert (scale.mean, scale.std, scale.num_videos) == (2.0, 1.0, 3)
    assert [scale.apply(reward) for reward in (1.0, 2.0, 3.5)] == [-1.0, 0.0, 1.5]
    for rewards in ([], [1.0], [2.0, 2.0, 2.0]):
        with pytest.raises(ValueError, match="calibrate on more, and different, videos"):
            compute_scale(rewards, data="val.csv", weights="w", video={})


def test_a_model_scores_on_its_scale_which_is_refused_for_another_head(small_model, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    with pytest.raises(ValueError, match=r"has no reward_scale\.json: make it with inference\.py --calibrate"):
        RewardModel.from_pretrained(folder, settings=SETTINGS, normalize=True)
    prompts = ["a shape"] * len(CLIPS)
    with RewardModel.from_pretrained(folder, settings=SETTINGS) as model:
        raw = model.score(CLIPS, prompts).rewards
        budget = dataclasses.asdict(model.loader.budget)
    checkpoint = read_checkpoint(folder)
    scale = compute_scale(raw, data="val.csv", weights=fingerprint(folder, checkpoint), video=budget)
    assert json.loads(save_scale(folder, scale).read_text())["num_videos"] == len(CLIPS)
    with RewardModel.from_pretrained(folder, settings=SETTINGS, normalize=True) as model:
        scaled = model.score(CLIPS, prompts).rewards
    assert scaled == pytest.approx([(reward - fmean(raw)) / stdev(raw) for reward in raw], abs=1e-4)
    assert "the scale was measured" not in caplog.text
    assert load_model_scale(folder, checkpoint, dataclasses.replace(SETTINGS, video_fps=3.0)) == scale
    assert "the scale was measured with videos read with" in caplog.text
    save_head(folder / "rm_head.pth", torch.load(folder / "rm_head.pth", weights_only=True)["rm_head.weight"] * 1.01)
    with pytest.raises(ValueError, match="other weights or another head"):
        load_model_scale(folder, read_checkpoint(folder), SETTINGS)
