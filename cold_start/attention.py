"""Attention over packed rows, for the text model and the vision tower.

A packed row holds several sequences (or video frames) one after the other; each attends to itself only. On CUDA in
half precision this is one variable-length flash attention call, an operator of its own so that compiled layers hold it
without a break; elsewhere, sequence by sequence through torch's SDPA, or as one batched call when all have the same
length. No mask is built and no work is spent on padding or across sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from flash_kernels import choose_kernels

# transformers hands whole packed rows with `cu_seq_lens` to implementations with "flash" in their name.
PACKED_ATTENTION = "packed_flash_or_sdpa"


def use_packed_attention(config) -> None:
    """Select packed attention in a Qwen3-VL config (text and vision), in place."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = PACKED_ATTENTION


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, T, dim], key and value [1, kv_heads, T, dim].

    `cu_seq_lens_q`: int32 [N + 1], where each of the N sequences begins and ends. Returns [1, T, heads, dim].
    """
    assert attention_mask is None, "packed rows carry their structure in cu_seq_lens, not in a mask"
    causal = module.is_causal if is_causal is None else is_causal
    query, key = query.to(value.dtype), key.to(value.dtype)
    if is_for_flash(query):
        flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output, _ = packed_flash(*flat, cu_seq_lens_q, max_length_q, causal, scaling)
        return output.unsqueeze(0), None
    return _attend_by_sequence(query, key, value, cu_seq_lens_q, scaling=scaling, causal=causal), None


def is_for_flash(query: Tensor) -> bool:
    """Whether flash attention supports its device and dtype."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


@torch.library.custom_op("cold_start::packed_flash", mutates_args=())
def packed_flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Flash attention of sequences to themselves: query [T, heads, dim], key and value [T, kv_heads, dim].

    Returns the output and the log-sum-exp, fp32 [heads, T], which has no gradient.
    """
    rows = ((bounds, bounds), (longest, longest))
    found = choose_kernels(query).forward(query, key, value, *rows, is_causal=is_causal, scaling=scaling)
    output, lse = (tensor.contiguous() for tensor in found)
    return output, lse


@packed_flash.register_fake
def _(query, key, value, bounds, longest, is_causal, scaling):
    length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, length), dtype=torch.float32)


@torch.library.custom_op("cold_start::packed_flash_backward", mutates_args=())
def packed_flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    is_causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    rows = ((bounds, bounds), (longest, longest))
    tensors = (gradient.contiguous(), query, key, value, output, lse)
    found = choose_kernels(query).backward(*tensors, *rows, is_causal=is_causal, scaling=scaling)
    to_query, to_key, to_value = (tensor.contiguous() for tensor in found)
    return to_query, to_key, to_value


@packed_flash_backward.register_fake
def _(gradient, query, key, value, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, bounds, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _backward(ctx, gradient: Tensor, _: Tensor | None):
    return *packed_flash_backward(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None, None


packed_flash.register_autograd(_backward, setup_context=_save_for_backward)


@torch.compiler.disable
def _attend_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *, scaling: float, causal: bool
) -> Tensor:
    """SDPA over each sequence of the row; shapes as in `packed_attention`."""
    lengths = torch.diff(bounds).tolist()
    arguments = {"is_causal": causal, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if len(set(lengths)) == 1:  # frames of one size: [1, heads, N * L, dim] -> [N, heads, L, dim]
        batched = (
            tensor[0].unflatten(1, (len(lengths), lengths[0])).transpose(0, 1) for tensor in (query, key, value)
        )
        return F.scaled_dot_product_attention(*batched, **arguments).transpose(1, 2).flatten(0, 1).unsqueeze(0)
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*piece, **arguments) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2)
