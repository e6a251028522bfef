"""The training forward: batches whose clips share one grid, without the per-clip work of the general forward.

The vision tower treats frame groups independently, so all clips of a batch pass through it as one long clip, and one
attention call serves all frame groups. The result equals `Qwen3VLForConditionalGeneration.forward` (tested).
"""

import torch
from torch.nn import functional
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration

from toy_batches import Batch, Grid

# "flash" in the name makes the vision tower hand over all frame groups at once.
EQUAL_SEGMENTS = "equal_segments_flash_sdpa"


def attend_equal_segments(module, query, key, value, attention_mask=None, *, scaling, max_length_q, **_):
    """Attention within segments of equal length. [1, heads, N * length, dim] -> [1, N * length, heads, dim]."""
    length = int(max_length_q)
    query, key, value = (x.squeeze(0).unflatten(1, (-1, length)).transpose(0, 1) for x in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None


def use_equal_segments(model: Qwen3VLForConditionalGeneration) -> None:
    """Make the vision tower attend by `attend_equal_segments`; right only for clips of one grid."""
    AttentionInterface.register(EQUAL_SEGMENTS, attend_equal_segments)
    model.model.visual.config._attn_implementation = EQUAL_SEGMENTS


def compute_batch_positions(is_video: torch.Tensor, grid_thw: Grid, merge_size: int) -> torch.Tensor:
    """M-RoPE positions of sequences with one clip of the same grid each: bool [B, L] -> int64 [3, B, L].

    The same numbers as `scored_sequence.compute_mrope_positions` gives row by row.
    """
    groups, height, width = grid_thw[0], grid_thw[1] // merge_size, grid_thw[2] // merge_size
    batch_size, device = is_video.shape[0], is_video.device
    slots = is_video.nonzero()[:, 1].view(batch_size, groups, height * width)
    step = (~is_video).long().scatter_(1, slots[..., -1], max(height, width))
    start = step.cumsum(dim=1) - step
    group_start = start.gather(1, slots[..., 0]).unsqueeze(-1)  # [B, groups, 1]
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    positions = start.expand(3, -1, -1).clone()
    for axis, offset in enumerate((torch.zeros_like(rows), rows, columns)):
        positions[axis].scatter_(1, slots.flatten(1), (group_start + offset).flatten(1))
    return positions


def compute_label_logits(model: Qwen3VLForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Logits that predict each labelled token of `batch.text`: [N, vocab_size]."""
    input_ids, config = batch.text.input_ids, model.config
    groups, height, width = batch.grid_thw
    joint_grid = torch.tensor([[len(input_ids) * groups, height, width]], device=input_ids.device)
    vision = model.model.visual(batch.pixel_values, grid_thw=joint_grid, return_dict=True)
    is_video = input_ids == config.video_token_id
    embeddings = model.get_input_embeddings()(input_ids)
    features = vision.pooler_output.to(embeddings.dtype)
    hidden = model.model.language_model(
        inputs_embeds=embeddings.masked_scatter(is_video.unsqueeze(-1), features),
        position_ids=compute_batch_positions(is_video, batch.grid_thw, config.vision_config.spatial_merge_size),
        visual_pos_masks=is_video,
        deepstack_visual_embeds=vision.deepstack_features,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.text.rows, batch.text.columns - 1])
