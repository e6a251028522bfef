"""The training row: every prompt once, followed by its responses, group after group, without padding.

    prompt A | CoT_1 <Reward> | CoT_2 <Reward> | ... | prompt B | CoT_1 <Reward> | ...

Each response goes on at position `prompt_positions.max() + 1` and attends to its prompt and to itself, so that the
row computes what the separate sequences `prompt, CoT, <Reward>, EOS` would. EOS is the label of a finished response's
last CoT token; nothing reads what stands after `<Reward>`, so EOS itself is left out of the row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from verl.data.scored_sequence import SequenceBuilder, compute_mrope_positions
from verl.types import Response, ResponseKey, VideoKey, VideoPrompt


class GroupSpan(NamedTuple):
    """Tokens of a group in the row: its prompt, and all its responses, which follow one another.

    `lengths`: tokens of (responses, prompt). `bounds`: for each of them int32 [2], 0 and the length.
    """

    prompt: slice
    responses: slice
    bounds: tuple[torch.Tensor, ...]
    lengths: tuple[int, int]


class SharedPromptLayout:
    """The structure of a row of T tokens, G groups and R responses.

    `prompt_lengths`: G ints. `response_lengths`: for each group the lengths of its responses (at least one),
    `<Reward>` included. `device`: where the index tensors are made, on first use.

    Not a dataclass: FSDP2 would take it apart among a layer's arguments and rebuild it, indices and all, per layer.

    Example: prompt_lengths (3,), response_lengths ((2, 1),) is the row p p p r r s with T = 6.
    """

    def __init__(
        self,
        prompt_lengths: tuple[int, ...],
        response_lengths: tuple[tuple[int, ...], ...],
        device: torch.device | str = "cpu",
    ) -> None:
        self.prompt_lengths = prompt_lengths
        self.response_lengths = response_lengths
        self.device = device
        segments = [n for p, r in zip(prompt_lengths, response_lengths, strict=True) for n in (p, *r)]
        self.num_tokens = sum(segments)
        self.longest_segment = max(segments)
        self._segments = segments

    def to(self, device: torch.device | str) -> "SharedPromptLayout":
        """The same layout with its indices on `device`."""
        return SharedPromptLayout(self.prompt_lengths, self.response_lengths, device)

    @cached_property
    def segment_bounds(self) -> torch.Tensor:
        """int32 [G + R + 1]: bounds of the segments (a prompt or a response each), which are causal to themselves."""
        return torch.tensor([0, *accumulate(self._segments)], dtype=torch.int32, device=self.device)

    @cached_property
    def groups(self) -> tuple[GroupSpan, ...]:
        """G spans: all responses of a group attend to their whole prompt."""
        spans, start = [], 0
        for prompt, responses in zip(self.prompt_lengths, self.response_lengths, strict=True):
            lengths = (sum(responses), prompt)
            bounds = torch.tensor([[0, length] for length in lengths], dtype=torch.int32, device=self.device)
            middle, end = start + prompt, start + sum(lengths)
            spans.append(GroupSpan(slice(start, middle), slice(middle, end), tuple(bounds.unbind()), lengths))
            start = end
        return tuple(spans)

    @cached_property
    def unrolled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The row as separate sequences `prompt, response`: (`source`, `index`).

        `source`: int64 [R, longest], the token of the row at each position; padded at the end with the row's first.
        `index`: int64 [T], where each token of the row lies in the flattened `source` (a prompt: in its first).
        """
        sequences = []
        for group, lengths in zip(self.groups, self.response_lengths, strict=True):
            prompt = torch.arange(group.prompt.start, group.prompt.stop)
            responses = torch.arange(group.responses.start, group.responses.stop).split(lengths)
            sequences += [torch.cat([prompt, response]) for response in responses]
        source = pad_sequence(sequences, batch_first=True)
        is_real = pad_sequence([torch.ones_like(tokens, dtype=torch.bool) for tokens in sequences], batch_first=True)
        filled = is_real.flatten().nonzero().squeeze(1).flip(0)  # reversed: a prompt's first sequence is written last
        index = torch.empty(self.num_tokens, dtype=torch.long)
        index[source.flatten()[filled]] = filled
        return source.to(self.device), index.to(self.device)


@dataclass(frozen=True)
class PackedGroups:
    """A row of G groups (a video with its responses each), R responses, L labels and T tokens.

    `input_ids`: int64 [T]. `position_ids`: int64 [3, T]. `video_positions`: int64, indices of the video tokens.
    `labels`: int64 [L], what the policy drew: each CoT token and, when finished, EOS. `label_positions`: int64 [L],
    the token of the row that predicts each label. `label_owner`: int64 [L], index of the response it belongs to.
    `reward_positions`: int64 [R], indices of `<Reward>`. `num_labels`: R ints. `keys`: the R responses. `video_keys`
    and `grid_thw`: the G videos and their patch grids.

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

    def to(self, device: torch.device | str) -> "PackedGroups":
        """A copy on `device`, made without waiting for the device."""
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
    """Lay groups into one row, on the CPU. `builder` knows the ids of `<Reward>`, video tokens and EOS."""
    assert groups, "nothing to pack"
    assert all(responses for _, responses in groups), "a video without responses"
    video_id, eos_id = builder.processor.video_token_id, builder.tokenizer.eos_token_id
    ids, positions, labels, label_positions, reward_positions = [], [], [], [], []
    num_packed = 0
    for prompt, responses in groups:
        prompt_positions = compute_mrope_positions(
            prompt.input_ids, video_token_id=video_id, grid_thw=prompt.grid_thw, merge_size=builder.merge_size
        )
        first_position = int(prompt_positions.max()) + 1
        ids.append(prompt.input_ids)
        positions.append(prompt_positions)
        num_packed += prompt.input_ids.numel()
        last_of_prompt = num_packed - 1
        for response in responses:
            cot, count = response.cot_ids, response.num_labels
            ids.append(torch.tensor([*cot, builder.reward_token_id]))
            positions.append(torch.arange(first_position, first_position + len(cot) + 1).expand(3, -1))
            labels += (*cot, eos_id)[:count]
            label_positions += (last_of_prompt, *range(num_packed, num_packed + len(cot)))[:count]
            num_packed += len(cot) + 1
            reward_positions.append(num_packed - 1)
    input_ids = torch.cat(ids)
    responses = [response for _, group in groups for response in group]
    num_labels = tuple(response.num_labels for response in responses)
    return PackedGroups(
        input_ids=input_ids,
        position_ids=torch.cat(positions, dim=1),
        video_positions=(input_ids == video_id).nonzero().squeeze(1),
        labels=torch.tensor(labels, dtype=torch.long),
        label_positions=torch.tensor(label_positions, dtype=torch.long),
        label_owner=torch.arange(len(responses)).repeat_interleave(torch.tensor(num_labels)),
        reward_positions=torch.tensor(reward_positions),
        num_labels=num_labels,
        keys=tuple(response.key for response in responses),
        video_keys=tuple(prompt.key for prompt, _ in groups),
        grid_thw=tuple(prompt.grid_thw for prompt, _ in groups),
        layout=SharedPromptLayout(
            prompt_lengths=tuple(prompt.input_ids.numel() for prompt, _ in groups),
            response_lengths=tuple(tuple(len(response.cot_ids) + 1 for response in group) for _, group in groups),
        ),
    )


def split_labels(values: torch.Tensor, packed: PackedGroups) -> dict[ResponseKey, torch.Tensor]:
    """Values of labels, [L, ...], by response: [num_labels, ...] each (views)."""
    return dict(zip(packed.keys, values.split(packed.num_labels), strict=True))


def join_labels(values: Mapping[ResponseKey, torch.Tensor], packed: PackedGroups) -> torch.Tensor:
    """The inverse of `split_labels`: values by response in the order of the row, [L, ...].

    Responses that are not in the row are left out.
    """
    pieces = [values[key] for key in packed.keys]
    assert tuple(map(len, pieces)) == packed.num_labels, "not one value per label"
    return torch.cat(pieces).to(packed.labels.device)
