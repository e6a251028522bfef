"""Attention over shared-prompt rows (text) and over packed frames (vision), without masks.

Text, on CUDA in half precision: two variable-length flash attention passes, merged by their log-sum-exps. In the
first, every prompt and every response is causal to itself; in the second, all responses of a group look at their
whole prompt. For a token that takes part in both,

    lse = log(exp(lse_1) + exp(lse_2)),    output = exp(lse_1 - lse) output_1 + exp(lse_2 - lse) output_2.

The flash backward recomputes a pass's probabilities as exp(score - lse) and needs the output only for
sum(grad * output). Given the merged output and the merged lse it therefore returns exactly the pass's share of the
gradient of the merged attention, and the shares of both passes add up (as in ring attention). No token of a prompt is
computed twice, and no pair of tokens that do not see each other is computed at all.

Elsewhere (CPU, fp32): each response is unrolled behind a copy of its prompt's keys, values and queries, and one
batched causal SDPA call serves all of them.
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from verl.core.packing import SharedPromptLayout
from verl.model.flash_kernels import choose_kernels
from verl.model.ulysses import RowPart

# transformers hands the vision tower's frames over together to implementations with "flash" in their name.
SHARED_PROMPT_ATTENTION = "shared_prompt_flash_or_sdpa"
FULL_WINDOW = (-1, -1)

Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def use_shared_prompt_attention(config) -> None:
    """Select this attention in a Qwen3-VL config (text and vision), in place."""
    AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = SHARED_PROMPT_ATTENTION


def compile_around_attention() -> None:
    """Let compiled layers call this attention uncompiled: its kernels are whole, and its layout is not a tensor.

    Only the merge of its two passes is compiled, into one kernel.
    """
    merge = torch.compile(merge_attention, dynamic=True)

    def attend(*arguments, **named):
        return shared_prompt_attention(*arguments, merge=merge, **named)

    AttentionInterface.register(SHARED_PROMPT_ATTENTION, torch.compiler.disable(attend))


def shared_prompt_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: SharedPromptLayout | None = None,
    row_part: RowPart | None = None,
    merge: Merge | None = None,
    **arguments: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, heads, T, dim], key and value [1, kv_heads, T, dim].

    `layout`: structure of the row (text); without it (vision) frames, from `cu_seq_lens_q`, attend to themselves.
    `row_part`: the tokens of the row that these are, if ranks share it. `merge`: a compiled `merge_attention`.
    Returns [1, T, heads, dim].
    """
    assert attention_mask is None, "packed rows carry their structure in a layout, not in a mask"
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, dim]
    if layout is None:
        bounds, longest = arguments["cu_seq_lens_q"], int(arguments["max_length_q"])
        if is_flash:
            output = varlen_attn(*flat, bounds, bounds, longest, longest, scale=scaling, window_size=FULL_WINDOW)
        else:
            output = _attend_frames(query, key, value, bounds, scaling)
        return output.unsqueeze(0), None
    if row_part is not None:
        flat = row_part.gather_tokens(*flat)
    if is_flash:
        output = SharedPromptFlash.apply(*flat, layout, scaling, choose_kernels(query), merge or merge_attention)
    else:
        output = _attend_unrolled(*flat, layout, scaling)
    if row_part is not None:
        output = row_part.gather_heads(output)
    return output.unsqueeze(0), None


def _attend_unrolled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SharedPromptLayout, scaling: float
) -> torch.Tensor:
    """[T, heads, dim] each. Each response causal behind its prompt; padding stands last, where nothing sees it."""
    source, index = layout.unrolled
    batched = (
        tensor.index_select(0, source.flatten()).unflatten(0, source.shape).transpose(1, 2)
        for tensor in (query, key, value)
    )
    is_grouped = key.shape[1] != query.shape[1]
    output = F.scaled_dot_product_attention(*batched, is_causal=True, scale=scaling, enable_gqa=is_grouped)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, index)


def _attend_frames(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scaling: float
) -> torch.Tensor:
    """[1, heads, T, dim] each to [T, heads, dim]: SDPA within frames, one call per run of frames of one size."""
    runs = [(length, len(list(frames))) for length, frames in groupby(torch.diff(bounds).tolist())]
    sizes = [length * count for length, count in runs]
    pieces = zip(*(tensor[0].split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for piece, (length, count) in zip(pieces, runs, strict=True):
        batched = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in piece)
        outputs.append(F.scaled_dot_product_attention(*batched, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


class SharedPromptFlash(torch.autograd.Function):
    """The two merged passes of the module's docstring: query [T, heads, dim], key and value [T, kv_heads, dim].

    The responses of a group lie side by side, so that the second pass is one call per group. `kernels`:
    FlashAttention2, or another implementation of the same functions. `merge`: `merge_attention`, compiled or not.
    """

    @staticmethod
    def forward(
        ctx, query, key, value, layout: SharedPromptLayout, scaling: float, kernels, merge: Merge
    ) -> torch.Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        pieces, longest = (layout.segment_bounds,) * 2, (layout.longest_segment,) * 2
        output, lse = kernels.forward(query, key, value, pieces, longest, is_causal=True, scaling=scaling)
        for group in layout.groups:
            prompt, responses = group.prompt, group.responses
            cross = (query[responses], key[prompt], value[prompt])
            part = kernels.forward(*cross, group.bounds, group.lengths, is_causal=False, scaling=scaling)
            merge(output[responses], lse[:, responses], *part)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scaling, ctx.kernels = layout, scaling, kernels
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        query, key, value, output, lse = ctx.saved_tensors
        gradient, layout, kernels, scaling = gradient.contiguous(), ctx.layout, ctx.kernels, ctx.scaling
        pieces, longest = (layout.segment_bounds,) * 2, (layout.longest_segment,) * 2
        gradients = kernels.backward(
            gradient, query, key, value, output, lse, pieces, longest, is_causal=True, scaling=scaling
        )
        for group in layout.groups:
            prompt, responses = group.prompt, group.responses
            cross = (gradient[responses], query[responses], key[prompt], value[prompt], output[responses])
            cross_lse = lse[:, responses].contiguous()
            shares = kernels.backward(*cross, cross_lse, group.bounds, group.lengths, is_causal=False, scaling=scaling)
            for total, tokens, share in zip(gradients, (responses, prompt, prompt), shares, strict=True):
                total[tokens] += share
        return *gradients, None, None, None, None


def merge_attention(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge attention over other keys, `part` [T, heads, dim] and `part_lse` [heads, T], into `output` and `lse`."""
    merged = torch.logaddexp(lse, part_lse)
    share, part_share = ((own - merged).exp().t().unsqueeze(-1) for own in (lse, part_lse))  # [T, heads, 1]
    output.copy_(share * output + part_share * part)
    lse.copy_(merged)
