"""The three terms of the objective: the policy loss, the KL to the reference, and Bradley-Terry.

The tokens of all responses follow one another in vectors of length L; `owner` is the index of each token's response.
A loss is a sum, for the policy that of weight_t * loss_t. Weights contain counts over the whole mini-batch and all
ranks, so that the losses of micro-batches and ranks add up to that of the mini-batch, however it was split. Without
tokens or pairs a loss is a zero that is still attached to the graph.

Notation: log r_t = log pi(t) - log pi_old(t), A_t the advantage, low and high the clip ratios, |y| the tokens of t's
response, sg[] a stopped gradient. Log-ratios are clamped to +-20 before they are exponentiated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from verl.config import ActorConfig, KlPenalty, LossAverage, PolicyLossType
from verl.types import ResponseKey

LOG_RATIO_BOUND = 20.0
LOW_VAR_KL_BOUND = 10.0  # a single token counts no more than this


class LossSums(NamedTuple):
    """`loss`: a scalar. `sums`: metrics by name, float64 scalars without gradient."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def compute_token_weights(
    owner: torch.Tensor, *, mode: LossAverage, num_tokens: int, num_responses: int
) -> torch.Tensor:
    """float32 [L]: the weight of each token's loss, from `owner`, int64 [L].

    `token`: 1 / num_tokens, every token of the mini-batch counts the same. `seq`: 1 / (|y| * num_responses), every
    response counts the same. `num_tokens` and `num_responses` (those with a label) are counted over the global
    mini-batch; all tokens of a response must be present.

    Example: owner [0, 0, 1] with 10 responses, `seq`: [0.05, 0.05, 0.1].
    """
    if mode == "token":
        return torch.full(owner.shape, 1.0 / max(num_tokens, 1), device=owner.device)
    return 1.0 / (torch.bincount(owner)[owner].float() * max(num_responses, 1))


def compute_importance_weights(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """Truncated importance sampling (Yao et al. 2025): min(pi_old(t) / pi_rollout(t), cap), float32 [L], no gradient.

    `old_log_probs` are the trainer's before the update, `rollout_log_probs` those of the engine that drew the tokens.
    The result multiplies the token weights of `compute_policy_loss`.
    """
    log_ratio = (old_log_probs.detach() - rollout_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp().clamp(max=cap)


def compute_policy_loss(
    log_probs: torch.Tensor,
    *,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    owner: torch.Tensor,
    weights: torch.Tensor,
    settings: ActorConfig,
) -> LossSums:
    """Policy loss of L tokens; all tensors [L], `owner` int64, the others float32. Only `log_probs` gets a gradient.

    Sums over tokens: `ratio`, r as the loss uses it; `approx_kl`, r_t - 1 - log r_t, an estimate of KL(old || new)
    (Schulman 2020); `clip_high`, `clip_low`, `clip_dual`, tokens that were clipped.

    Token losses by `settings.loss_type`, with the three clip ratios of `settings`:
    `default`, PPO with two clip ratios and dual clip c (Schulman et al. 2017; Yu et al. 2025, arXiv 2503.14476; Ye et
        al. 2020, arXiv 1912.09729): max(-r A, -clip(r, 1 - low, 1 + high) A), and where A < 0 at most -c A;
    `gspo` (Zheng et al. 2025, arXiv 2507.18071, section 4.1): the same with the response's ratio
        s = exp(mean_t log r_t) in place of r_t, one for all its tokens;
    `gspo_token` (there, section 4.3): with sg[s] * pi(t) / sg[pi(t)], which has the value of `gspo` and a gradient per
        token, so that advantages may differ between tokens;
    `cispo` (MiniMax 2025, arXiv 2506.13585, section 3.1): -sg[clip(r, 1 - low, 1 + high)] A log pi(t), a gradient from
        every token, and no dual clip.
    """
    old_log_probs = old_log_probs.detach()
    ratio = _compute_log_ratio(log_probs, old_log_probs, owner, settings.loss_type).exp()
    low, high = 1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high
    clipped = ratio.clamp(low, high)
    if settings.loss_type == "cispo":
        losses = -clipped.detach() * advantages * log_probs
        active = {"clip_high": ratio > high, "clip_low": ratio < low, "clip_dual": torch.zeros_like(ratio)}
    else:
        pessimistic = torch.maximum(-ratio * advantages, -clipped * advantages)
        bounded = torch.minimum(pessimistic, -settings.clip_ratio_dual * advantages)
        losses = torch.where(advantages < 0, bounded, pessimistic)
        active = {
            "clip_high": (advantages > 0) & (ratio > high),
            "clip_low": (advantages < 0) & (ratio < low),
            "clip_dual": (advantages < 0) & (ratio > settings.clip_ratio_dual),
        }
    with torch.no_grad():
        token_log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        approx_kl = token_log_ratio.expm1() - token_log_ratio
        values = {"ratio": ratio, "approx_kl": approx_kl, **active}
        sums = {name: value.double().sum() for name, value in values.items()}
    return LossSums(loss=(losses * weights).sum(), sums=sums)


def _compute_log_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, owner: torch.Tensor, loss_type: PolicyLossType
) -> torch.Tensor:
    """log r_t, or the response's, [L], clamped."""
    log_ratio = log_probs - old_log_probs
    if loss_type == "gspo":
        log_ratio = compute_response_means(log_ratio, owner)
    elif loss_type == "gspo_token":
        log_ratio = compute_response_means(log_ratio, owner).detach() + (log_probs - log_probs.detach())
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def compute_response_means(values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens of each token's response, [L], differentiable. `owner`: int64 [L]."""
    lengths = torch.bincount(owner)
    sums = values.new_zeros(lengths.shape).index_add(0, owner, values)
    return sums[owner] / lengths[owner]


def compute_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, *, kind: KlPenalty) -> torch.Tensor:
    """KL estimate per token, float32 [L], from the log-probs of the drawn tokens under policy and reference, [L].

    With d = log pi - log pi_ref (Schulman 2020, "Approximating KL divergence"): `kl` d; `abs` |d|; `mse` d^2 / 2;
    `low_var_kl` exp(-d) + d - 1 with d clamped to +-20 and the result to at most 10 (no gradient beyond either). As a
    loss, `kl` has a gradient of zero mean: it is meant for the reward. `full` has `compute_full_kl`.
    """
    difference = log_probs - ref_log_probs.detach()
    match kind:
        case "kl":
            return difference
        case "abs":
            return difference.abs()
        case "mse":
            return difference.square() / 2
    assert kind == "low_var_kl", f"{kind} needs whole distributions: use compute_full_kl"
    difference = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (torch.expm1(-difference) + difference).clamp(max=LOW_VAR_KL_BOUND)


def compute_full_kl(log_distribution: torch.Tensor, ref_log_distribution: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of whole distributions: log-probabilities [L, V] each; returns [L], differentiable.

    Forbidden tokens, -inf in both, contribute nothing to value or gradient.
    """
    is_allowed = log_distribution.isfinite()
    difference = log_distribution.masked_fill(~is_allowed, 0.0) - ref_log_distribution.masked_fill(~is_allowed, 0.0)
    return (log_distribution.exp() * difference).sum(dim=-1)


def compute_pair_loss(
    rewards: torch.Tensor, keys: Sequence[ResponseKey], preferences: Mapping[int, int | None]
) -> LossSums:
    """Sum of -logsigmoid(chosen reward - rejected reward) (Bradley and Terry 1952) over the decided pairs (A_i, B_i).

    Ties and pairs without a usable label leave loss and sums alike. Sums: `num_correct`, pairs whose chosen reward is
    strictly higher; `chosen_reward`; `rejected_reward`.

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
    return LossSums(loss=(losses * is_decided).sum(), sums=sums)
