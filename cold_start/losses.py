"""Losses on the rewards of preference pairs.

A loss is a sum over pairs; the caller divides it by the number of contributing pairs over all ranks and accumulation
steps, so that the gradient depends neither on micro-batching nor on the number of ranks. Pairs that a loss cannot use
leave sum and count alike; a sum without pairs is a zero that is still attached to the graph.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

LossType = Literal["bt", "btt", "margin", "constant_margin", "scaled", "reg"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
SCORE_LOSSES = frozenset({"margin", "scaled", "reg"})  # need MOS scores
AGREEMENT_LOSSES = frozenset({"scaled"})  # unbounded below for a pair whose scores contradict its label
TIE_LOSSES = frozenset({"btt", "reg"})  # learn from ties

TIE_K = 5.0  # theta of the Rao-Kupper model: larger means more ties
CONSTANT_MARGIN = 0.57
SCORE_CENTER = 3.0  # middle of the 1..5 opinion scale


@dataclass(frozen=True)
class PairLabels:
    """Labels of P pairs in D dimensions, all tensors of shape [P, D].

    `preference`: float32, +1 when A is better, -1 when B is, 0 for a tie. `is_valid`: bool, False leaves a label out
    of everything. `score_a`, `score_b`: float32 opinion scores on 1..5, NaN where the data has none.
    """

    preference: torch.Tensor
    is_valid: torch.Tensor
    score_a: torch.Tensor
    score_b: torch.Tensor

    def to(self, device: torch.device | str) -> "PairLabels":
        return PairLabels(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def pin_memory(self) -> "PairLabels":
        """A copy in page-locked memory, from which `to` copies asynchronously."""
        return PairLabels(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})

    def contributes(self, loss_type: LossType) -> torch.Tensor:
        """bool [P, D]: which labels a loss uses."""
        usable = self.is_valid if loss_type in TIE_LOSSES else self.is_valid & (self.preference != 0)
        if loss_type in SCORE_LOSSES:
            usable = usable & self.score_a.isfinite() & self.score_b.isfinite()
        return usable

    def count(self, loss_type: LossType) -> torch.Tensor:
        """How many pairs have a label that a loss uses, a scalar."""
        return self.contributes(loss_type).any(dim=1).sum()


def compute_pair_loss(
    rewards_a: torch.Tensor, rewards_b: torch.Tensor, labels: PairLabels, *, loss_type: LossType
) -> torch.Tensor:
    """Sum of the pair losses over the pairs that contribute; rewards float32 [P, D], returns a scalar.

    A pair's loss is the mean over the dimensions whose label contributes. With d = chosen reward - rejected reward and
    m = chosen score - rejected score: `bt` -logsigmoid(d) (Bradley and Terry 1952); `btt` with ties (Rao and Kupper
    1967), k = 5: -logsigmoid(d - log k) for a preference, -logsigmoid(d - log k) - logsigmoid(-d - log k)
    - log(k^2 - 1) for a tie; `margin` -logsigmoid(d - m); `constant_margin` -logsigmoid(d - 0.57); `scaled`
    -m logsigmoid(d); `reg` the mean over the two videos of (reward - (score - 3))^2.
    """
    used = labels.contributes(loss_type)
    # Unused pairs get a zero difference and a zero weight, so that NaN scores cannot leak through 0 * NaN.
    preference = torch.where(used, labels.preference, 0.0)
    score_a = torch.where(used, labels.score_a, SCORE_CENTER)
    score_b = torch.where(used, labels.score_b, SCORE_CENTER)
    difference = preference * (rewards_a - rewards_b)
    margin = preference * (score_a - score_b)
    if loss_type == "bt":
        losses = -F.logsigmoid(difference)
    elif loss_type == "btt":
        losses = _tie_aware_losses(rewards_a - rewards_b, preference)
    elif loss_type == "margin":
        losses = -F.logsigmoid(difference - margin)
    elif loss_type == "constant_margin":
        losses = -F.logsigmoid(difference - CONSTANT_MARGIN)
    elif loss_type == "scaled":
        losses = -margin * F.logsigmoid(difference)
    else:
        assert loss_type == "reg", loss_type
        errors = (rewards_a - (score_a - SCORE_CENTER), rewards_b - (score_b - SCORE_CENTER))
        losses = (errors[0].square() + errors[1].square()) / 2
    return ((losses * used).sum(dim=1) / used.sum(dim=1).clamp(min=1)).sum()


def _tie_aware_losses(difference: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Rao-Kupper losses for reward differences A - B and preferences +1, -1 or 0 (tie)."""
    log_k = math.log(TIE_K)
    preferred = -F.logsigmoid(preference * difference - log_k)
    tied = -F.logsigmoid(difference - log_k) - F.logsigmoid(-difference - log_k) - math.log(TIE_K**2 - 1)
    return torch.where(preference == 0, tied, preferred)


def compute_pair_sums(
    loss_sum: torch.Tensor,
    rewards_a: torch.Tensor,
    rewards_b: torch.Tensor,
    labels: PairLabels,
    *,
    loss_type: LossType,
) -> torch.Tensor:
    """What is logged of P pairs, float64 [2 + 4 D], to be added up over micro-batches and ranks; see `compute_means`.

    The loss sum, the number of pairs in it, then by dimension over decided pairs (valid and not tied): their number,
    how many have the chosen video's reward above the rejected one's (equal rewards count as wrong), chosen and
    rejected rewards.
    """
    decided = labels.is_valid & (labels.preference != 0)
    a_chosen = labels.preference > 0
    chosen = torch.where(a_chosen, rewards_a, rewards_b).detach().double()
    rejected = torch.where(a_chosen, rewards_b, rewards_a).detach().double()
    columns = torch.stack([torch.ones_like(chosen), (chosen > rejected).double(), chosen, rejected])
    head = torch.stack([loss_sum.detach().double(), labels.count(loss_type).double()])
    return torch.cat([head, torch.where(decided, columns, 0.0).sum(dim=1).T.flatten()])


def compute_means(sums: torch.Tensor, dimensions: Sequence[str]) -> dict[str, float]:
    """Loss, accuracy, chosen_reward, rejected_reward and margin of `compute_pair_sums`, all but the loss by dimension
    (`accuracy/VQ`) where there are several, and only where a pair was decided."""
    loss, num_pairs, *by_dimension = sums.tolist()
    means = {"loss": loss / max(num_pairs, 1.0)}
    for index, name in enumerate(dimensions):
        num_decided, num_correct, chosen, rejected = by_dimension[4 * index : 4 * index + 4]
        if num_decided:
            suffix = f"/{name}" if len(dimensions) > 1 else ""
            means |= {
                f"accuracy{suffix}": num_correct / num_decided,
                f"chosen_reward{suffix}": chosen / num_decided,
                f"rejected_reward{suffix}": rejected / num_decided,
                f"margin{suffix}": (chosen - rejected) / num_decided,
            }
    return means
