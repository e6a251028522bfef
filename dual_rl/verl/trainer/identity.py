"""What makes a run the same run: written into every checkpoint and compared before a run continues.

A checkpoint does not hold everything that a run depends on: frozen weights and the reference (known by content), the
data and its order, how clips become frames, the format prompt, and which weights train.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config import Config
from verl.config_loading import CONFIG_FILE, get_setting
from verl.model.fingerprint import fingerprint
from verl.model.reward_files import PolicyCheckpoint
from verl.types import PreferencePair

ORDER_SETTINGS = {"batch_size": "data.rollout_batch_size", "shuffle": "data.shuffle", "seed": "data.seed"}
MODEL_SETTINGS = tuple(
    f"worker.actor.model.{name}" for name in ("lora.rank", "lora.alpha", "freeze_vision_tower", "trainable_head")
)

Identity = dict[str, object]


def describe_run(config: Config, checkpoint: PolicyCheckpoint, train_pairs: Sequence[PreferencePair]) -> Identity:
    """What a continued run must share, as JSON values by name. `checkpoint`: what training starts from."""
    settings = {key: get_setting(config, key) for key in (*ORDER_SETTINGS.values(), *MODEL_SETTINGS)}
    digest = hashlib.sha256()
    for pair in train_pairs:  # without the paths: videos may be moved between two runs
        digest.update(repr((pair.pair_id, pair.problem, pair.answer)).encode())
    return settings | {
        "training data": digest.hexdigest()[:16],
        "weights": fingerprint(config.worker.actor.model.model_path, checkpoint),
        "frames": asdict(checkpoint.video_budget),
        "format prompt": checkpoint.format_prompt,
    }


def read_identity(checkpoint: Path, state: Mapping[str, Any]) -> Identity:
    """The identity of a checkpoint. Older checkpoints have its parts in `stream`, `model` and the saved settings."""
    if "identity" in state:
        return state["identity"]
    stream, saved = state["stream"], OmegaConf.load(checkpoint / CONFIG_FILE)
    return {
        **{key: stream[name] for name, key in ORDER_SETTINGS.items()},
        **{key: OmegaConf.select(saved, key) for key in MODEL_SETTINGS},
        "training data": stream["fingerprint"],
        **state.get("model", {}),
    }


def require_same_run(saved: Identity, present: Identity, *, checkpoint: Path) -> None:
    """Raise ValueError that names what differs between the run of `checkpoint` and this one."""
    changed = [
        f"{name} was {saved[name]} and is {value}" if "." in name else f"other {name}"
        for name, value in present.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(changed)}. Set worker.actor.model.* and data.* back, or "
            "start a new run with another trainer.experiment_name."
        )
