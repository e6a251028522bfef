"""Attention over packed rows, for the text model and the vision tower alike.

A packed row holds several sequences (or video frames) one after the other; each attends to itself only. On CUDA in
half precision this is one variable-length flash attention call; elsewhere, sequence by sequence through torch's SDPA,
or as one batched call when all have the same length. No mask is built and no work is spent on padding or across
sequences.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# transformers hands whole packed rows with `cu_seq_lens` to implementations with "flash" in their name.
PACKED_ATTENTION = "packed_flash_or_sdpa"
VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not before torch 2.12
FULL_WINDOW, CAUSAL_WINDOW = (-1, -1), (-1, 0)


def use_packed_attention(config) -> None:
    """Select packed attention in a Qwen3-VL config (text and vision), in place."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = PACKED_ATTENTION


def compile_around_attention() -> None:
    """Let compiled layers call this attention as it is: its kernels are whole."""
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, heads, T, dim], key and value [1, kv_heads, T, dim].

    `cu_seq_lens_q`: int32 [N + 1], where each of the N sequences begins and ends. Returns [1, T, heads, dim].
    """
    assert attention_mask is None, "packed rows carry their structure in cu_seq_lens, not in a mask"
    causal = module.is_causal if is_causal is None else is_causal
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if VARLEN_SHARES_HEADS:
            arguments = {"enable_gqa": key.shape[1] != query.shape[1]}
        else:
            arguments, groups = {}, query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output = varlen_attn(
            *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=CAUSAL_WINDOW if causal else FULL_WINDOW,
            **arguments,
        )
        return output.unsqueeze(0), None
    lengths = torch.diff(cu_seq_lens_q).tolist()
    return _attend_by_sequence(query, key, value, lengths, scaling=scaling, causal=causal), None


def _attend_by_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], *, scaling: float, causal: bool
) -> torch.Tensor:
    """SDPA over each sequence of the row; shapes as in `packed_attention`."""
    arguments = {"is_causal": causal, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if len(set(lengths)) == 1:  # frames of one size: [1, heads, N * L, dim] -> [N, heads, L, dim]
        batched = (
            tensor[0].unflatten(1, (len(lengths), lengths[0])).transpose(0, 1) for tensor in (query, key, value)
        )
        return F.scaled_dot_product_attention(*batched, **arguments).transpose(1, 2).flatten(0, 1).unsqueeze(0)
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*piece, **arguments) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2)
