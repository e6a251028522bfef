"""Rewards on a known scale: kept with the model, named, and refused for another one."""

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from scoring.reward_model import RewardModel
from scoring.scale import RewardScale, compute_scale, load_scale, save_scale
from scoring.scoring import ScoringSettings
from scoring.source import read_checkpoint
from verl.model.fingerprint import fingerprint
from verl.model.reward_files import save_head

CLIPS = sorted((Path(__file__).resolve().parents[1] / "data" / "videos").glob("*.mp4"))[:4]
BUDGET = {"fps": 2.0}
SETTINGS = ScoringSettings(backend="hf", batch_size=4, max_new_tokens=6)


def test_a_scale_is_mean_and_standard_deviation():
    scale = compute_scale([1.0, 2.0, 3.0], data="val.csv", weights="w", video=BUDGET)
    assert (scale.mean, scale.std, scale.num_videos) == (2.0, 1.0, 3)
    assert [scale.apply(reward) for reward in (1.0, 2.0, 3.5)] == [-1.0, 0.0, 1.5]


@pytest.mark.parametrize("rewards", [[], [1.0], [2.0, 2.0, 2.0]])
def test_no_spread_is_no_scale(rewards):
    with pytest.raises(ValueError, match="calibrate on more, and different, videos"):
        compute_scale(rewards, data="val.csv", weights="w", video=BUDGET)


def test_a_scale_is_kept_with_its_model_and_refused_for_another(tmp_path):
    with pytest.raises(ValueError, match=r"has no reward_scale\.json: make it with inference\.py --calibrate"):
        load_scale(tmp_path, weights="w")
    scale = RewardScale(1.0, 2.0, 10, "val.csv", "w", BUDGET)
    save_scale(tmp_path, scale)
    assert load_scale(tmp_path, weights="w") == scale
    with pytest.raises(ValueError, match="other weights or another head"):
        load_scale(tmp_path, weights="x")


def test_a_fingerprint_is_of_the_content(small_model, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(small_model, folder)
    original = fingerprint(small_model, read_checkpoint(small_model))
    assert fingerprint(folder, read_checkpoint(folder)) == original
    head = torch.load(folder / "rm_head.pth", weights_only=True)["rm_head.weight"]
    save_head(folder / "rm_head.pth", head * 1.01)
    assert fingerprint(folder, read_checkpoint(folder)) != original
    save_head(folder / "rm_head.pth", head)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert fingerprint(folder, read_checkpoint(folder)) != original


def test_the_python_interface_scores_on_the_scale(small_model, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    prompts = ["a shape"] * len(CLIPS)
    with RewardModel.from_pretrained(folder, settings=SETTINGS) as model:
        raw = model.score(CLIPS, prompts).rewards
        budget = dataclasses.asdict(model.loader.budget)
    weights = fingerprint(folder, read_checkpoint(folder))
    save_scale(folder, compute_scale(raw, data="val.csv", weights=weights, video=budget))
    with RewardModel.from_pretrained(folder, settings=SETTINGS, normalize=True) as model:
        scaled = model.score(CLIPS, prompts).rewards
        assert model.scale.data == "val.csv"
    assert scaled == pytest.approx([(reward - fmean(raw)) / stdev(raw) for reward in raw], abs=1e-4)
    assert "the scale was measured" not in caplog.text
    other = dataclasses.replace(SETTINGS, video_fps=3.0)
    RewardModel.from_pretrained(folder, settings=other, normalize=True).close()
    assert "the scale was measured with videos read with" in caplog.text
    assert json.loads((folder / "reward_scale.json").read_text())["num_videos"] == len(CLIPS)
