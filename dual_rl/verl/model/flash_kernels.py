"""Variable-length flash attention on CUDA, forward and backward, with its log-sum-exp.

FlashAttention-2 comes with torch. FlashAttention-4 (the package flash-attn-4) is used where it is installed and known
to be correct: on Hopper, for heads of 64 or 128. For heads of 72 (the vision tower's) its 4.0.0b36 returns wrong
gradients of the queries.

Both share their arguments: query [Tq, heads, dim], key and value [Tk, kv_heads, dim]; `bounds`, int32, where each
sequence of (queries, keys) begins and ends; `longest`, the longest sequences of both.
"""

from functools import cache
from importlib.util import find_spec

import torch

FLASH4_DIMS = (64, 128)
FLASH4_CAPABILITY = 9
"""Compute capability (major) of Hopper."""


class FlashAttention2:
    """Torch's own; 2.11 to 2.13 take these arguments. No dropout, so the random state is a dummy."""

    @staticmethod
    def forward(query, key, value, bounds, longest, *, is_causal, scaling) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [Tq, heads, dim] and log-sum-exp, fp32 [heads, Tq]."""
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *bounds, *longest, 0.0, is_causal, False, scale=scaling
        )
        return output, lse

    @staticmethod
    def backward(gradient, query, key, value, output, lse, bounds, longest, *, is_causal, scaling):
        """Gradients of query, key and value, in their shapes."""
        random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, output, lse, *bounds, *longest, 0.0, is_causal, random_state, unused,
            scale=scaling,
        )  # fmt: skip


class FlashAttention4:
    """The package flash-attn-4; its autograd function does not take a log-sum-exp from elsewhere, its kernels do."""

    @staticmethod
    def forward(query, key, value, bounds, longest, *, is_causal, scaling) -> tuple[torch.Tensor, torch.Tensor]:
        """As of FlashAttention2."""
        from flash_attn.cute.interface import _flash_attn_fwd

        rows = _name_rows(bounds, longest)
        output, lse, *_ = _flash_attn_fwd(
            query, key, value, softmax_scale=scaling, causal=is_causal, return_lse=True, **rows
        )
        return output, lse

    @staticmethod
    def backward(gradient, query, key, value, output, lse, bounds, longest, *, is_causal, scaling):
        """As of FlashAttention2."""
        from flash_attn.cute.interface import _flash_attn_bwd

        rows = _name_rows(bounds, longest)
        return _flash_attn_bwd(
            query, key, value, output, gradient, lse, softmax_scale=scaling, causal=is_causal, **rows
        )[:3]


def _name_rows(bounds, longest) -> dict[str, object]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (*bounds, *longest), strict=True))


def choose_kernels(query: torch.Tensor) -> type[FlashAttention2] | type[FlashAttention4]:
    """The fastest kernels that are correct for `query` [..., dim]."""
    is_supported = query.shape[-1] in FLASH4_DIMS and has_flash4(query.device)
    return FlashAttention4 if is_supported else FlashAttention2


@cache
def has_flash4(device: torch.device) -> bool:
    """Whether FlashAttention-4 is installed and `device` is a Hopper GPU."""
    is_hopper = torch.cuda.get_device_capability(device)[0] == FLASH4_CAPABILITY
    return is_hopper and find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
