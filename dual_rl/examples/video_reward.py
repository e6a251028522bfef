"""The reward in the forms in which trainers of video generators call one, in this process.

Flow-GRPO and its like call a function with generated clips in memory:

    reward = VideoReward("results/mine/global_step_100", fps=16)
    scores, info = reward(videos, prompts, metadata)      # videos: float [n, frames, 3, height, width] in [0, 1]

DanceGRPO and its like call a scorer with the paths of clips that they have saved:

    reward.reward(["clip.mp4"], ["a cat runs"], use_norm=True)      # [{"Overall": 0.83}]

Scores on a known scale (`normalize=True`, `use_norm=True`) need `inference.py --calibrate` first.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch

from scoring.reward_model import RewardModel
from scoring.types import ScoringSettings


class VideoReward:
    """A reward model as a function of clips and prompts. `fps`: frames per second of clips in memory.

    `normalize`: scores in standard deviations from the mean of the validation set, else the head's own.
    """

    def __init__(
        self,
        model_ckpt: str | os.PathLike,
        *,
        fps: float = 16.0,
        normalize: bool = False,
        settings: ScoringSettings | None = None,
    ) -> None:
        self.fps = fps
        self.normalize = normalize
        self.model = RewardModel.from_pretrained(model_ckpt, settings=settings, normalize=normalize)

    def __call__(
        self, videos: torch.Tensor | np.ndarray, prompts: Sequence[str], metadata: object = None
    ) -> tuple[np.ndarray, dict[str, list[str]]]:
        """Scores float32 [n], and the chains of thought.

        `videos`: tensor [n, frames, 3, height, width] or array [n, frames, height, width, 3], uint8 or floats in
        [0, 1]. `metadata` is ignored. Raises VideoError when a clip cannot be scored.
        """
        rewards, cots = self.model.score([to_frames(video) for video in videos], prompts, fps=self.fps)
        return np.array(rewards, dtype=np.float32), {"cots": cots}

    def reward(
        self, video_paths: Sequence[str], prompts: Sequence[str], use_norm: bool = False
    ) -> list[dict[str, float]]:
        """A dict with `Overall` for each clip. Raises ValueError if `use_norm` asks for another scale than it has."""
        if use_norm != self.normalize:
            raise ValueError(f"use_norm={use_norm}, but this reward was made with normalize={self.normalize}")
        return [{"Overall": reward} for reward in self.model.score(video_paths, prompts).rewards]

    def close(self) -> None:
        """Stop the engine."""
        self.model.close()


def to_frames(video: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """A clip in uint8; floats are taken to lie in [0, 1], as diffusion pipelines give them."""
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu()
        return video if video.dtype == torch.uint8 else (video.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return video if video.dtype == np.uint8 else (video.clip(0, 1) * 255).round().astype(np.uint8)
