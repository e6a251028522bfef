"""Bradley-Terry on the rewards of the response pairs (A_i, B_i), i = 1..n, of each preference pair.

The loss is a sum. The caller divides it by the number of decided pairs in the global mini-batch, so that neither
micro-batching nor the number of ranks changes the gradient. Ties and pairs without a usable label leave sum and count
alike. A sum without pairs is a zero that is still attached to the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from verl.types import ResponseKey


@dataclass(frozen=True)
class PairLoss:
    """`loss`: scalar sum over the decided pairs. `sums`: float64 scalars over these, without gradient.

    `num_correct`, chosen reward strictly above the rejected one; `chosen_reward`; `rejected_reward`.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def compute_pair_loss(
    rewards: torch.Tensor, keys: Sequence[ResponseKey], preferences: Mapping[int, int | None]
) -> PairLoss:
    """Sum of -logsigmoid(chosen reward - rejected reward) (Bradley and Terry 1952) over the decided pairs.

    `rewards`: float32 [R]. `keys`: the R responses, in any order, A_i and B_i of each pair. `preferences` by pair_id:
    +1 (A is better), -1, 0 (tie) or None (no label).

    Example: rewards (1.0, 0.0) of (7, "A", 0), (7, "B", 0) with preference +1 give log(1 + e^-1) = 0.3133.
    """
    index = {key: i for i, key in enumerate(keys)}
    assert len(index) == len(keys), "a response occurs twice"
    missing = [key for key in keys if key._replace(side="B" if key.side == "A" else "A") not in index]
    assert not missing, f"responses without their partner: {missing[:3]}"
    pairs = [
        (index[key], index[key._replace(side="B")], preferences[key.pair_id] or 0) for key in keys if key.side == "A"
    ]
    table = torch.tensor(pairs, dtype=torch.long, device=rewards.device).view(-1, 3)
    rewards_a, rewards_b, preference = rewards[table[:, 0]], rewards[table[:, 1]], table[:, 2]
    is_decided = preference != 0
    losses = -F.logsigmoid(preference * (rewards_a - rewards_b))
    chosen = torch.where(preference > 0, rewards_a, rewards_b).detach().double()
    rejected = torch.where(preference > 0, rewards_b, rewards_a).detach().double()
    values = {"num_correct": (chosen > rejected).double(), "chosen_reward": chosen, "rejected_reward": rejected}
    sums = {name: (value * is_decided).sum() for name, value in values.items()}
    return PairLoss(loss=(losses * is_decided).sum(), sums=sums)
