"""Decoding that reads the cache of a prompt once for all its responses, with an attention backend for vLLM.

A decode step is bound by memory, and stock attention reads a prompt's keys and values again for each of the n
responses. `choose_backend` turns sharing on where vLLM and the device support it, and logs whether it is on.
"""

import importlib
import logging

import torch

from verl.config import RolloutConfig

logger = logging.getLogger(__name__)

HOPPER = (9, 0)
BACKEND = "verl.rollout.shared_prompt.backend.SharedPromptBackend"


def choose_backend(config: RolloutConfig, device: torch.device) -> dict[str, object]:
    """Arguments of `vllm.LLM` that turn shared-prompt decoding on; none where it is off or cannot work."""
    reason = find_obstacle(config, device)
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    level = logging.WARNING if is_first and device.type == "cuda" else logging.INFO  # workers show warnings only
    if reason is not None:
        logger.log(level, "shared-prompt decoding is off: %s", reason)
        return {}
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    logger.log(level, "shared-prompt decoding is on: a prompt's cache is read once for its %d responses", config.n)
    return {"attention_config": {"backend": AttentionBackendEnum.CUSTOM.name}}


def find_obstacle(config: RolloutConfig, device: torch.device) -> str | None:
    """Why prompts cannot be shared in decoding; None where they can."""
    if not config.shared_prompt_decoding:
        return "worker.rollout.shared_prompt_decoding=false"
    if device.type != "cuda":
        return f"it needs a GPU, and this rank has a {device.type}"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return f"its attention kernel needs a Hopper card, and this is a {torch.cuda.get_device_name(device)}"
    if config.tensor_parallel_size > 1:
        return "it is not tested with tensor parallelism"
    return find_obstacle_in_vllm()


def find_obstacle_in_vllm() -> str | None:
    """Why the installed vLLM does not fit the backend, which extends its FlashAttention 3 backend; None if it fits."""
    importlib.import_module("vllm.entrypoints.llm")  # first: some of vLLM's modules import each other
    flash_attn = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    if flash_attn.get_flash_attn_version() != 3:
        return "vLLM has no FlashAttention 3 here"
    shape = getattr(flash_attn.FlashAttentionBackend, "get_kv_cache_shape", None)
    if shape is None or shape(1, 16, 2, 8) != (1, 2, 16, 2, 8):
        return "this version of vLLM keeps keys and values in another layout"
    return None
