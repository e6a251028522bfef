"""The example that trainers of video generators call, in both of its forms."""

import importlib.util
from pathlib import Path

import decord
import numpy as np
import pytest
import torch

from scoring.types import ScoringSettings

DUAL_RL = Path(__file__).resolve().parents[1]
CLIPS = [DUAL_RL / "data" / "videos" / f"example_0_{side}.mp4" for side in "ab"]
PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("video_reward", DUAL_RL / "examples" / "video_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reward(example, small_model):
    made = example.VideoReward(small_model, fps=8.0, settings=ScoringSettings(backend="hf", max_new_tokens=6))
    yield made
    made.close()


def read_clips() -> np.ndarray:
    """uint8 [2, frames, height, width, 3], cut to the shorter clip and the smaller size."""
    clips = [decord.VideoReader(str(path)).get_batch(range(16)).asnumpy() for path in CLIPS]
    height, width = (min(clip.shape[axis] for clip in clips) for axis in (1, 2))
    return np.stack([clip[:, :height, :width] for clip in clips])


def test_clips_in_memory_score_alike_in_every_form(reward):
    clips = read_clips()
    tensor = torch.from_numpy(clips).permute(0, 1, 4, 2, 3)
    scores, info = reward(clips, PROMPTS, None)
    assert (scores.dtype, scores.shape, len(info["cots"])) == (np.float32, (2,), 2)
    for form in (tensor.float() / 255, clips.astype(np.float32) / 255):
        again, _ = reward(form, PROMPTS, [{}, {}])
        assert again == pytest.approx(scores, abs=1e-5)


def test_saved_clips_score_as_the_model_says_on_its_own_scale_only(reward, example, small_model):
    expected = reward.model.score(CLIPS, PROMPTS).rewards
    results = reward.reward([str(clip) for clip in CLIPS], PROMPTS)
    assert [result["Overall"] for result in results] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="made with normalize=False"):
        reward.reward([str(CLIPS[0])], PROMPTS[:1], use_norm=True)
    with pytest.raises(ValueError, match=r"make it with inference\.py --calibrate"):
        example.VideoReward(small_model, normalize=True, settings=ScoringSettings(backend="hf"))
