"""Sequence parallelism after DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

The P neighbouring ranks of a group work on the same packed row. It is cut into P equal runs of tokens (padded at its
end), and each rank computes everything that works token by token for its run: embeddings, projections, MLPs, norms,
and finally the rewards and the log-probs of the labels that its tokens predict. Only attention needs the other ranks:
there each rank trades its tokens' heads for all tokens of its share of the heads, and back.

Unlike the original, hidden states are never gathered. The scores of all labels are summed up instead, L numbers, so
that every rank of the group has the scores of the whole row and the same loss. With each copy of the loss divided by
P, the sum of the ranks' gradients is that of one rank with the whole row.
"""

import dataclasses
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from verl.core.objective import PolicyOutput
from verl.core.packing import PackedGroups


def build_sequence_group(size: int) -> dist.ProcessGroup | None:
    """This rank's group of `size` neighbours that share each row, None where every rank works alone.

    A collective over all ranks; `size` divides them.
    """
    return None if size == 1 else dist.new_subgroups(group_size=size)[0]


class RowPart:
    """This rank's run of tokens of a row, `start` to `end`, padded to `length` tokens.

    `batch`: the tokens, video tokens, labels and rewards of the run, with positions counted from `start`; layout, keys
    and grids stay those of the whole row. `videos`, `labels`, `rewards`: int64, indices of the run's video tokens,
    labels and responses among those of the row.

    Example: a row of 5 tokens over 2 ranks has runs of 0..3 and 3..5, the latter with one token of padding.
    Not a dataclass: FSDP2 would take it apart among a layer's arguments.
    """

    def __init__(self, batch: PackedGroups, group: dist.ProcessGroup) -> None:
        self.group, self.num_ranks = group, dist.get_world_size(group)
        self.num_tokens = batch.num_tokens
        self.length = -(-batch.num_tokens // self.num_ranks)
        self.start = min(dist.get_rank(group) * self.length, batch.num_tokens)
        self.end = min(self.start + self.length, batch.num_tokens)
        self.num_labels, self.num_responses = len(batch.labels), len(batch.keys)
        self.videos = self._find(batch.video_positions)
        self.labels = self._find(batch.label_positions)
        self.rewards = self._find(batch.reward_positions)
        padding = (0, self.length - (self.end - self.start))
        self.batch = dataclasses.replace(
            batch,
            input_ids=F.pad(batch.input_ids[self.start : self.end], padding),
            position_ids=F.pad(batch.position_ids[:, self.start : self.end], padding),
            video_positions=batch.video_positions[self.videos] - self.start,
            labels=batch.labels[self.labels],
            label_positions=batch.label_positions[self.labels] - self.start,
            label_owner=batch.label_owner[self.labels],
            reward_positions=batch.reward_positions[self.rewards] - self.start,
        )

    def _find(self, positions: torch.Tensor) -> torch.Tensor:
        return ((positions >= self.start) & (positions < self.end)).nonzero().squeeze(1)

    def gather_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the run's [length, heads, dim] to [T, heads / P, dim]: the whole row, for this rank's heads.

        Key and value heads that do not divide into P are repeated until they do.
        """
        repeats = math.lcm(key.shape[1], self.num_ranks) // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        by_rank = (tensor.unflatten(1, (self.num_ranks, -1)).transpose(0, 1) for tensor in (query, key, value))
        return tuple(_Exchange.apply(part, self.group).flatten(0, 1)[: self.num_tokens] for part in by_rank)

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """The way back, for attention's output: [T, heads / P, dim] to the run's [length, heads, dim]."""
        padded = F.pad(tensor, (0, 0, 0, 0, 0, self.num_ranks * self.length - self.num_tokens))
        by_rank = padded.unflatten(0, (self.num_ranks, self.length))
        return _Exchange.apply(by_rank, self.group).transpose(0, 1).flatten(1, 2)

    def join(self, output: PolicyOutput) -> PolicyOutput:
        """From the output of the run to that of the whole row, the same on every rank of the group."""

        def sum_up(values: torch.Tensor | None, indices: torch.Tensor, count: int) -> torch.Tensor | None:
            if values is None:
                return None
            return _Sum.apply(values.new_zeros(count).index_copy(0, indices, values), self.group)

        of_labels = ("log_probs", "entropy", "full_kl")
        return output._replace(
            rewards=sum_up(output.rewards, self.rewards, self.num_responses),
            **{name: sum_up(getattr(output, name), self.labels, self.num_labels) for name in of_labels},
        )


class _Exchange(torch.autograd.Function):
    """[P, ...]: part j is swapped for the part that rank j of the group has for this one. Its own adjoint."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the group, on every rank. Its own adjoint, because every rank's copy is used."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None
