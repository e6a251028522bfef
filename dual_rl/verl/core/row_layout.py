"""Where prompts and responses lie in a packed row, in the forms that attention needs."""

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


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
