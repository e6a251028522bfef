"""Bradley-Terry on the rewards of response pairs (A_i, B_i), i = 1..n, of a preference pair.

A loss is a sum with a count; the caller multiplies by bt_weight and divides by the count over the global mini-batch,
so that neither micro-batching nor the number of ranks changes the gradient. Ties and pairs without a usable label
leave sum and count alike; a sum without pairs is a zero that is still attached to the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from verl.types import ResponseKey


class PairIndex(NamedTuple):
    """Which of R responses form pairs, for P = R / 2 pairs.

    `a`, `b`: int64 [P], places of A_i and B_i among the responses. `pair_ids`: the preference pair of each.

    Example: keys (7, "A", 0), (7, "B", 0) give a [0], b [1], pair_ids (7,).
    """

    a: torch.Tensor
    b: torch.Tensor
    pair_ids: tuple[int, ...]


def index_pairs(keys: Sequence[ResponseKey]) -> PairIndex:
    """Find (A_i, B_i) among responses in any order. Fails when a response is there twice or its partner is missing."""
    places = {key: place for place, key in enumerate(keys)}
    assert len(places) == len(keys), "a response occurs twice"
    missing = [key for key in keys if key._replace(side="B" if key.side == "A" else "A") not in places]
    assert not missing, f"responses without their partner: {missing[:3]}"
    of_a = [key for key in keys if key.side == "A"]
    return PairIndex(
        a=torch.tensor([places[key] for key in of_a], dtype=torch.long),
        b=torch.tensor([places[key._replace(side="B")] for key in of_a], dtype=torch.long),
        pair_ids=tuple(key.pair_id for key in of_a),
    )


def encode_preferences(preferences: Sequence[int | None]) -> torch.Tensor:
    """int64 [P] for `compute_pair_loss`: +1, -1, and 0 for ties and None, which Bradley-Terry both leaves out."""
    return torch.tensor([preference or 0 for preference in preferences], dtype=torch.long)


@dataclass(frozen=True)
class PairLoss:
    """`loss`: scalar sum over the decided pairs. `sums`: float64 scalars over these, without gradient.

    `num_correct`, chosen reward strictly above the rejected one; `chosen_reward`; `rejected_reward`.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def compute_pair_loss(rewards_a: torch.Tensor, rewards_b: torch.Tensor, *, preferences: torch.Tensor) -> PairLoss:
    """Sum of -logsigmoid(chosen reward - rejected reward) (Bradley and Terry 1952) over the decided pairs.

    Rewards float32 [P]; `preferences` int64 [P] as from `encode_preferences`. Fails when the shapes differ.

    Example: rewards 1.0 against 0.0 with preference +1 give log(1 + e^-1) = 0.3133.
    """
    assert rewards_a.shape == rewards_b.shape == preferences.shape, "one reward for A and for B per preference"
    is_decided = preferences != 0
    losses = -F.logsigmoid(preferences * (rewards_a - rewards_b))
    chosen = torch.where(preferences > 0, rewards_a, rewards_b).detach().double()
    rejected = torch.where(preferences > 0, rewards_b, rewards_a).detach().double()
    values = {
        "num_correct": (chosen > rejected).double(),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    sums = {name: (value * is_decided).sum() for name, value in values.items()}
    return PairLoss(loss=(losses * is_decided).sum(), sums=sums)
