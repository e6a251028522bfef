"""The objective of stage 2: the policy learns to think by reinforcement, the head to score by preferences.

    L = L_policy + kl_coef * KL(policy || reference) + bt_weight * L_BT

L_policy: the clipped policy loss of every response token, weighted by its response's advantage (GRPO).
KL:       an estimate for every response token, where the KL is a loss and not taken off the reward.
L_BT:     -log sigmoid(chosen reward - rejected reward) of the response pairs (A_i, B_i) that have a preference.

Each term is a sum over its items divided by their number in the whole mini-batch, over all ranks and micro-batches.
The losses of the rows of a mini-batch therefore add up to the loss of the whole, however it was split. Values of a
response are looked up by its `ResponseKey`, a preference by its pair, never by an index into a list.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from verl.config import AlgorithmConfig, Config
from verl.core.losses import (
    compute_importance_weights,
    compute_kl,
    compute_pair_loss,
    compute_policy_loss,
    compute_token_weights,
)
from verl.core.packing import PackedGroups, join_labels
from verl.core.token_log_probs import Distributions
from verl.types import ResponseKey


class PolicyOutput(NamedTuple):
    """Output of one packed forward, fp32: `rewards` [R] of the responses, `log_probs` and `entropy` [L] of the labels.

    `entropy`, in nats, has no gradient. `full_kl`: [L], KL(policy || reference) over the whole vocabulary, if the
    reference's distributions were given. `distributions`: this model's own, if asked for (in a sequence group: of the
    labels that this rank's tokens predict).
    """

    rewards: torch.Tensor
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    full_kl: torch.Tensor | None = None
    distributions: Distributions | None = None


class GlobalCounts(NamedTuple):
    """Counts of one mini-batch over all ranks: labels, responses with a label, pairs (A_i, B_i) with a preference."""

    tokens: int
    responses: int
    pairs: int


@dataclass(frozen=True)
class Experience:
    """Everything that is fixed before the update; log-probs are float32 [num_labels] by response.

    `rollout_log_probs`: of the engine that wrote the responses. `old_log_probs`: of the policy before the update; None
    while it is unchanged. `ref_log_probs`: of the reference; None if no term needs them. `preferences`: +1 (A is
    better), -1, 0 (tie) or None by pair_id.
    """

    advantages: Mapping[ResponseKey, float]
    preferences: Mapping[int, int | None]
    rollout_log_probs: Mapping[ResponseKey, torch.Tensor]
    old_log_probs: Mapping[ResponseKey, torch.Tensor] | None = None
    ref_log_probs: Mapping[ResponseKey, torch.Tensor] | None = None


def dual_loss(
    output: PolicyOutput, packed: PackedGroups, experience: Experience, counts: GlobalCounts, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of one packed row in the loss of its mini-batch, and its shares of the metrics.

    Metrics add up over rows and ranks; of those that end in `_max` the largest counts. Nothing is read back from the
    device. A row without a label or a preference gives a zero that is attached to the graph.
    """
    actor, algorithm, owner = config.worker.actor, config.algorithm, packed.label_owner
    num_tokens, num_pairs = max(counts.tokens, 1), max(counts.pairs, 1)
    advantages = torch.tensor([experience.advantages[key] for key in packed.keys], device=owner.device)
    rollout = join_labels(experience.rollout_log_probs, packed)
    is_on_policy = experience.old_log_probs is None
    old = output.log_probs.detach() if is_on_policy else join_labels(experience.old_log_probs, packed)
    weights = compute_token_weights(
        owner, mode=actor.loss_avg_mode, num_tokens=counts.tokens, num_responses=counts.responses
    )
    cap = config.worker.importance_sampling_cap
    policy = compute_policy_loss(
        output.log_probs,
        old_log_probs=old,
        advantages=advantages[owner],
        owner=owner,
        weights=weights if cap is None else weights * compute_importance_weights(old, rollout, cap=cap),
        settings=actor,
    )
    pairs = compute_pair_loss(output.rewards, packed.keys, experience.preferences)
    metrics = {"actor/policy_loss": policy.loss, "bt/loss": pairs.loss / num_pairs}
    loss = policy.loss
    if algorithm.has_kl_loss:
        metrics["actor/kl"] = (weights * _token_kl(output, packed, experience, algorithm)).sum()
        loss = loss + algorithm.kl_coef * metrics["actor/kl"]
    loss = loss + actor.bt_weight * metrics["bt/loss"]
    difference = (old - rollout).abs()
    is_beyond = difference > config.worker.rollout.log_prob_bound
    metrics |= {f"actor/{name}": value / num_tokens for name, value in policy.sums.items()}
    metrics |= {f"bt/{name}": pairs.sums[name] / num_pairs for name in ("chosen_reward", "rejected_reward")}
    metrics |= {
        "actor/loss": loss,
        "actor/entropy": (weights * output.entropy).sum(),
        "bt/accuracy": pairs.sums["num_correct"] / num_pairs,
        "rollout/log_prob_difference_mean": difference.sum() / num_tokens,
        "rollout/log_prob_beyond_bound": is_beyond.sum() / num_tokens,
        "rollout/log_prob_difference_max": torch.cat([difference, difference.new_zeros(1)]).max(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _token_kl(
    output: PolicyOutput, packed: PackedGroups, experience: Experience, algorithm: AlgorithmConfig
) -> torch.Tensor:
    """KL to the reference at every label, [L]."""
    if algorithm.kl_penalty == "full":
        return output.full_kl
    return compute_kl(output.log_probs, join_labels(experience.ref_log_probs, packed), kind=algorithm.kl_penalty)
