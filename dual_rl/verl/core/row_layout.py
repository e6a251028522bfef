"""What is where in a row of prompts with their responses, in the forms that attention needs."""

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch


class GroupPlace(NamedTuple):
    """Where a group stands in the row: its prompt, and all its responses, which follow one another.

    `lengths`: tokens of (responses, prompt). `bounds`: int32 [2] of both, 0 and the length.
    """

    prompt: slice
    responses: slice
    bounds: tuple[torch.Tensor, ...]
    lengths: tuple[int, int]


class SharedPromptLayout:
    """Which part of a row is what, as attention needs it.

    For G groups with R responses in all and T tokens: `prompt_lengths`: G ints. `response_lengths`: for each group the
    lengths of its responses (at least one), `<Reward>` included. `device`: where the index tensors are made.

    Indices are made when first asked for and kept. Not a dataclass, because FSDP2 takes dataclasses among a layer's
    arguments apart and would have them made anew in every layer.

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

    def to(self, device: torch.device | str) -> "SharedPromptLayout":
        """The same layout with its indices on `device`."""
        return SharedPromptLayout(self.prompt_lengths, self.response_lengths, device)

    @cached_property
    def group_starts(self) -> tuple[int, ...]:
        """G + 1 ints: where each group begins in the row, and T."""
        sizes = (p + sum(r) for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True))
        return tuple(accumulate(sizes, initial=0))

    @cached_property
    def response_starts(self) -> tuple[int, ...]:
        """R ints: where each response begins in the row."""
        starts = []
        for start, prompt, responses in zip(
            self.group_starts[:-1], self.prompt_lengths, self.response_lengths, strict=True
        ):
            starts.extend(accumulate(responses[:-1], initial=start + prompt))
        return tuple(starts)

    @cached_property
    def flat_response_lengths(self) -> tuple[int, ...]:
        """R ints."""
        return tuple(length for lengths in self.response_lengths for length in lengths)

    @cached_property
    def segment_bounds(self) -> torch.Tensor:
        """int32 [G + R + 1]: bounds of the pieces, prompt or response, that are causal to themselves."""
        pieces = (n for p, r in zip(self.prompt_lengths, self.response_lengths, strict=True) for n in (p, *r))
        return torch.tensor([0, *accumulate(pieces)], dtype=torch.int32, device=self.device)

    @cached_property
    def longest_segment(self) -> int:
        return max(*self.prompt_lengths, *self.flat_response_lengths)

    @cached_property
    def groups(self) -> tuple[GroupPlace, ...]:
        """G places: how the responses of each group look at their prompt."""
        places = []
        for start, prompt, end in zip(self.group_starts[:-1], self.prompt_lengths, self.group_starts[1:], strict=True):
            lengths = (end - start - prompt, prompt)
            bounds = torch.tensor([[0, length] for length in lengths], dtype=torch.int32, device=self.device)
            places.append(
                GroupPlace(slice(start, start + prompt), slice(start + prompt, end), tuple(bounds.unbind()), lengths)
            )
        return tuple(places)

    @cached_property
    def unrolled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The row as separate sequences `prompt, response`: (`source`, `place`).

        `source`: int64 [R, longest], which token of the row stands where; padded at the end with the row's first.
        `place`: int64 [T], where each token of the row stands in the flattened `source` (a prompt: in its first).
        """
        counts = [len(lengths) for lengths in self.response_lengths]
        prompts = torch.tensor(self.prompt_lengths).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
        group_starts = torch.tensor(self.group_starts[:-1]).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
        starts, lengths = (
            torch.tensor(values).unsqueeze(1) for values in (self.response_starts, self.flat_response_lengths)
        )
        column = torch.arange(int((prompts + lengths).max())).unsqueeze(0)
        source = torch.where(column < prompts, group_starts + column, starts + column - prompts)
        is_real = column < prompts + lengths
        source = torch.where(is_real, source, 0)
        flat = is_real.flatten().nonzero().squeeze(1).flip(0)  # reversed: a prompt's first sequence is written last
        place = torch.empty(self.group_starts[-1], dtype=torch.long)
        place[source.flatten()[flat]] = flat
        return source.to(self.device), place.to(self.device)
