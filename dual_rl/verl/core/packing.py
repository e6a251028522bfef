"""The training row: every prompt once, followed by its responses, group after group, without padding.

    prompt A | CoT_1 <Reward> | CoT_2 <Reward> | ... | prompt B | CoT_1 <Reward> | ...

Each response goes on at position `prompt_positions.max() + 1` and attends to its prompt and to itself, so that the
row computes what the separate sequences `prompt, CoT, <Reward>, EOS` would. EOS is the label of a finished response's
last CoT token; nothing reads what stands after `<Reward>`, so EOS itself is left out of the row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from verl.core.row_layout import SharedPromptLayout
from verl.data.scored_sequence import SequenceBuilder, compute_mrope_positions
from verl.types import Response, ResponseKey, VideoKey, VideoPrompt


@dataclass(frozen=True)
class PackedGroups:
    """A row of G groups (one video with its responses each), R responses, L labels and T tokens.

    `input_ids`: int64 [T]. `position_ids`: int64 [3, T]. `video_positions`: int64, tokens of the row that stand for
    video features, in order. `labels`: int64 [L], what the policy drew: each CoT token and, when finished, EOS.
    `label_positions`: int64 [L], the token of the row that predicts each. `label_owner`: int64 [L], which of the R
    responses a label belongs to. `reward_positions`: int64 [R], where `<Reward>` stands. `num_labels`: R ints.
    `keys`: the R responses. `video_keys` and `grid_thw`: the G videos and their patch grids.

    Example: a prompt of 3 tokens and one finished response of ids (5, 9) give T = 6, L = 3, labels (5, 9, EOS),
    label_positions (2, 3, 4), reward_positions (5,).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    video_positions: torch.Tensor
    labels: torch.Tensor
    label_positions: torch.Tensor
    label_owner: torch.Tensor
    reward_positions: torch.Tensor
    num_labels: tuple[int, ...]
    keys: tuple[ResponseKey, ...]
    video_keys: tuple[VideoKey, ...]
    grid_thw: tuple[tuple[int, int, int], ...]
    layout: SharedPromptLayout

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_responses(self) -> int:
        return len(self.keys)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str) -> "PackedGroups":
        """A copy on `device`, made without waiting for what the device is doing."""
        tensors = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        if torch.device(device).type == "cuda":
            tensors = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in tensors.items()}
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return dataclasses.replace(self, **tensors, layout=self.layout.to(device))


def pack_groups(groups: Sequence[tuple[VideoPrompt, Sequence[Response]]], builder: SequenceBuilder) -> PackedGroups:
    """Lay groups into one row, on the CPU. `builder`: tells the ids of `<Reward>`, video tokens and EOS."""
    assert groups, "nothing to pack"
    assert all(responses for _, responses in groups), "a video without responses"
    tokens = builder.sequence_tokens
    responses = [response for _, group in groups for response in group]
    layout = SharedPromptLayout(
        prompt_lengths=tuple(prompt.input_ids.numel() for prompt, _ in groups),
        response_lengths=tuple(tuple(len(response.cot_ids) + 1 for response in group) for _, group in groups),
    )
    input_ids, positions = [], []
    for prompt, group in groups:
        prompt_positions = compute_mrope_positions(
            prompt.input_ids, video_token_id=tokens.video_id, grid_thw=prompt.grid_thw, merge_size=tokens.merge_size
        )
        start = int(prompt_positions.max()) + 1
        input_ids.append(prompt.input_ids)
        positions.append(prompt_positions)
        for response in group:
            input_ids.append(torch.tensor([*response.cot_ids, tokens.reward_id]))
            positions.append(torch.arange(start, start + len(response.cot_ids) + 1).expand(3, -1))
    ids = torch.cat(input_ids)
    reward_positions = torch.tensor(layout.response_starts) + torch.tensor(layout.flat_response_lengths) - 1
    return PackedGroups(
        input_ids=ids,
        position_ids=torch.cat(positions, dim=1),
        video_positions=(ids == tokens.video_id).nonzero().squeeze(1),
        reward_positions=reward_positions,
        **_build_labels(layout, groups, eos_id=tokens.eos_id),
        num_labels=tuple(response.num_labels for response in responses),
        keys=tuple(response.key for response in responses),
        video_keys=tuple(prompt.key for prompt, _ in groups),
        grid_thw=tuple(prompt.grid_thw for prompt, _ in groups),
        layout=layout,
    )


def _build_labels(layout: SharedPromptLayout, groups, *, eos_id: int) -> dict[str, torch.Tensor]:
    """`labels`, `label_positions` and `label_owner` of PackedGroups."""
    labels, positions, counts = [], [], []
    starts = iter(layout.response_starts)
    for group_start, (prompt, group) in zip(layout.group_starts[:-1], groups, strict=True):
        last_of_prompt = group_start + prompt.input_ids.numel() - 1
        for response in group:
            start, count = next(starts), response.num_labels
            labels += (*response.cot_ids, eos_id)[:count]
            positions += (last_of_prompt, *range(start, start + len(response.cot_ids)))[:count]
            counts.append(count)
    return {
        "labels": torch.tensor(labels, dtype=torch.long),
        "label_positions": torch.tensor(positions, dtype=torch.long),
        "label_owner": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
    }


def split_labels(values: torch.Tensor, packed: PackedGroups) -> dict[ResponseKey, torch.Tensor]:
    """Values of labels, [L, ...], back to their responses: [num_labels, ...] each (views)."""
    return dict(zip(packed.keys, values.split(packed.num_labels), strict=True))


def join_labels(values: Mapping[ResponseKey, torch.Tensor], packed: PackedGroups) -> torch.Tensor:
    """The inverse of `split_labels`: values by response, [num_labels, ...] each, in the order of the row, [L, ...].

    Responses that are not in the row are left out.
    """
    pieces = [values[key] for key in packed.keys]
    assert tuple(map(len, pieces)) == packed.num_labels, "not one value per label"
    return torch.cat(pieces).to(packed.device)
