"""A reward model on disk: where it is, what it was trained with, and the known scale of its rewards.

A Bradley-Terry reward has no zero and no unit of its own. `reward_scale.json` beside the checkpoint has the mean and
standard deviation over a validation set. It names the weights that it was measured with and is refused for others.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import ClassVar, TypeVar

from scoring.types import MAX_PROMPT_LENGTH, NUM_TOKENS_AFTER_COT, ScoredVideo, ScoringSettings
from verl.data.vision_process import VideoBudget
from verl.model.reward_files import PolicyCheckpoint, find_folder, fingerprint, load_checkpoint
from verl.trainer.checkpoints import write_atomically

logger = logging.getLogger(__name__)


def find_model(path: str | os.PathLike) -> str:
    """The model's folder in a stage 2 `global_step_N` or `actor`; any other path is returned unchanged."""
    for inner in ("actor/huggingface", "huggingface"):
        if (Path(path) / inner).is_dir():
            return str(Path(path) / inner)
    return os.fspath(path)


def read_checkpoint(model_ckpt: str | os.PathLike, rm_ckpt: str | os.PathLike | None = None) -> PolicyCheckpoint:
    """A reward model without its weights. Raises ValueError that says what is missing and how to get it."""
    if os.path.isabs(model_ckpt) and not os.path.isdir(model_ckpt):
        raise ValueError(f"no model folder at {model_ckpt}")
    return load_checkpoint(find_model(model_ckpt), rm_ckpt, with_weights=False)


def choose_prompt_length(checkpoint: PolicyCheckpoint, settings: ScoringSettings) -> int:
    """Tokens of the longest prompt. Raises ValueError if prompt and chain of thought exceed the model's positions."""
    positions = checkpoint.config.text_config.max_position_embeddings
    room = positions - settings.max_new_tokens - NUM_TOKENS_AFTER_COT
    length = settings.max_prompt_length or min(MAX_PROMPT_LENGTH, room)
    if not 0 < length <= room:
        raise ValueError(
            f"max_new_tokens={settings.max_new_tokens} leaves {room} of {positions} positions for the prompt, "
            f"which needs {settings.max_prompt_length or 'some'}: lower max_new_tokens or max_prompt_length"
        )
    return length


def choose_budget(checkpoint: PolicyCheckpoint, settings: ScoringSettings) -> VideoBudget:
    """The model's own video budget, with what the settings change."""
    return checkpoint.video_budget.replace(fps=settings.video_fps, max_pixels=settings.max_pixels)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on the validation CSV `data`, in a file FILE beside the model.

    `weights`: fingerprint of the model and its head. `video`: the budget that the videos were read with.
    `num_thoughts`, `quantization`: as of `ScoringSettings`; None where older versions did not record them.
    """

    FILE: ClassVar[str]

    data: str
    weights: str
    video: dict[str, float]
    num_thoughts: int | None = None
    quantization: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewardScale(Calibration):
    """(reward - `mean`) / `std`, measured on `num_videos`.

    `mask_cot`: whether there were no thoughts. The rest is of the thoughts, see scoring/watch.py. None: not recorded.

    Example: mean 1.5 and std 0.5 turn a reward of 2.0 into 1.0, one standard deviation above the validation's mean.
    """

    FILE: ClassVar[str] = "reward_scale.json"

    mean: float
    std: float
    num_videos: int
    mask_cot: bool | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    faulty: float | None = None

    def apply(self, reward: float) -> float:
        """The reward on this scale."""
        return (reward - self.mean) / self.std


def apply_scale_to_video(video: ScoredVideo, scale: RewardScale | None) -> ScoredVideo:
    """The same with rewards and standard error on `scale`."""
    if scale is None:
        return video
    error = video.standard_error
    return replace(
        video,
        reward=scale.apply(video.reward),
        standard_error=None if error is None else error / scale.std,
        thoughts=tuple(replace(thought, reward=scale.apply(thought.reward)) for thought in video.thoughts),
    )


def compute_scale(rewards: Sequence[float], *, data: str, **measured: object) -> RewardScale:
    """Mean and unbiased standard deviation; the rest as of `Calibration`. Raises ValueError if there is no spread."""
    if len(rewards) < 2 or min(rewards) == max(rewards):
        raise ValueError(
            f"{len(set(rewards))} distinct reward(s) on {data} give no scale: calibrate on more, and different, videos"
        )
    return RewardScale(mean=fmean(rewards), std=stdev(rewards), num_videos=len(rewards), data=data, **measured)


Kind = TypeVar("Kind", bound=Calibration)


def save_calibration(model_ckpt: str | os.PathLike, calibration: Calibration) -> Path:
    """Write its file into the model's folder, complete or not at all; returns its path."""
    path = find_folder(find_model(model_ckpt)) / calibration.FILE
    write_atomically(path, json.dumps(asdict(calibration), indent=2) + "\n")
    return path


def load_calibration(
    kind: type[Kind], model_ckpt: str | os.PathLike, checkpoint: PolicyCheckpoint, settings: ScoringSettings
) -> Kind:
    """What is kept with a model; warns if it was measured with other settings.

    Raises ValueError if there is none, or it was measured with other weights.
    """
    model = find_model(model_ckpt)
    path = find_folder(model) / kind.FILE
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {kind.FILE}: make it with inference.py --calibrate on a validation CSV"
        )
    try:
        kept = kind(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Run inference.py --calibrate again.") from error
    if kept.weights != fingerprint(model, checkpoint):
        raise ValueError(f"{path} was measured with other weights or another head: run --calibrate again")
    if getattr(kept, "mask_cot", None) not in (None, settings.mask_cot):
        raise ValueError(f"{path} was measured with mask_cot={kept.mask_cot}, another scale: run --calibrate again")
    now = {name: getattr(settings, name) for name in ("num_thoughts", "quantization")}
    now["video"] = asdict(choose_budget(checkpoint, settings))
    for name, value in now.items():
        if getattr(kept, name) not in (None, value):
            logger.warning("%s was measured with %s=%s, now it is %s", kind.FILE, name, getattr(kept, name), value)
    return kept


def find_calibration(kind: type[Kind], model_ckpt: str | os.PathLike, *rest: object) -> Kind | None:
    """`load_calibration`, or None where there is none or, with a warning, it is of another model."""
    if not (find_folder(find_model(model_ckpt)) / kind.FILE).is_file():
        return None
    try:
        return load_calibration(kind, model_ckpt, *rest)
    except ValueError as error:
        logger.warning("%s", error)
        return None
