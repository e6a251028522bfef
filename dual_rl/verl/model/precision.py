"""The precision of weights and matrix products."""

import torch

from verl.config import Precision


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, and of an engine's weights: `auto` is bf16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
