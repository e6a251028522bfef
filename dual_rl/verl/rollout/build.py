"""Chooses a rank's rollout engine."""

from collections.abc import Sequence
from pathlib import Path

import torch

from verl.config import RolloutConfig
from verl.rollout.engine import RolloutEngine


def build_engine(
    folder: Path,
    *,
    config: RolloutConfig,
    max_model_len: int,
    forbidden_token_ids: Sequence[int],
    eos_token_id: int,
    device: torch.device,
) -> RolloutEngine:
    """The engine that `config.name` asks for, without weights: call `load_weights` before `generate`.

    `folder`: holds config.json and the processor's files; weights in it are not read. `max_model_len`: tokens of the
    longest prompt and its response together. `forbidden_token_ids`: never drawn, and left out of the distribution.
    `device`: of this rank. With several ranks, torch.distributed is initialised and every rank calls this.
    """
    if config.name == "vllm":
        from verl.rollout.vllm_engine import VllmEngine as Engine  # vLLM need not be installed
    else:
        from verl.rollout.hf_engine import HfEngine as Engine
    return Engine(
        folder,
        config=config,
        max_model_len=max_model_len,
        forbidden_token_ids=forbidden_token_ids,
        eos_token_id=eos_token_id,
        device=device,
    )
