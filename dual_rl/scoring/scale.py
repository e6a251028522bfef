"""Rewards on a known scale: mean and standard deviation over a validation set, kept beside the checkpoint.

A Bradley-Terry reward has no zero and no unit of its own. A scale says what its zero and unit mean for one checkpoint;
it names the weights that it was measured with and is refused for others.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

SCALE_FILE = "reward_scale.json"


@dataclass(frozen=True)
class RewardScale:
    """(reward - `mean`) / `std`. `num_videos` of `data` gave it; `weights`: fingerprint of the model and its head.

    `video`: the budget that the videos were read with.

    Example: mean 1.5 and std 0.5 turn a reward of 2.0 into 1.0, one standard deviation above the validation's mean.
    """

    mean: float
    std: float
    num_videos: int
    data: str
    weights: str
    video: dict[str, float]

    def apply(self, reward: float) -> float:
        """The reward on this scale."""
        return (reward - self.mean) / self.std


def compute_scale(rewards: Sequence[float], *, data: str, weights: str, video: dict[str, float]) -> RewardScale:
    """Mean and unbiased standard deviation. Raises ValueError when there is no spread to divide by."""
    if len(rewards) < 2 or min(rewards) == max(rewards):
        raise ValueError(
            f"{len(set(rewards))} distinct reward(s) on {data} give no scale: calibrate on more, and different, videos"
        )
    return RewardScale(fmean(rewards), stdev(rewards), len(rewards), data, weights, dict(video))


def save_scale(folder: Path, scale: RewardScale) -> Path:
    """Write `reward_scale.json` into the model's folder, complete or not at all; returns its path."""
    path = folder / SCALE_FILE
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(asdict(scale), indent=2) + "\n")
    os.replace(temporary, path)
    return path


def load_scale(folder: Path, *, weights: str) -> RewardScale:
    """The scale of a model. Raises ValueError when there is none, or it was measured with other weights."""
    path = folder / SCALE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SCALE_FILE}: make it with inference.py --calibrate on a validation CSV")
    scale = RewardScale(**json.loads(path.read_text()))
    if scale.weights != weights:
        raise ValueError(f"{path} was measured with other weights or another head: run --calibrate again")
    return scale
