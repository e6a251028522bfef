"""Policy gradient losses over a flat run of response tokens.

The tokens of all responses follow one another in vectors of length L; `owner` is the index of each token's response.
A loss is sum_t weight_t * loss_t. The weights contain counts over the whole mini-batch and all ranks, so that the
losses of micro-batches and ranks add up to that of the mini-batch, however it was split. With L = 0 the loss is a zero
that is still attached to the graph.

Notation: log r_t = log pi(t) - log pi_old(t), A_t the advantage, low and high the clip ratios, |y| the tokens of t's
response, sg[] a stopped gradient. log r is clamped to +-20 before it is exponentiated.
"""

from dataclasses import dataclass

import torch

from verl.config import ActorConfig, LossAverage, PolicyLossType

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """`loss`: scalar, sum of weighted token losses. `sums`: float64 scalars over the L tokens, without gradient.

    `ratio`, r as the loss uses it; `approx_kl`, r_t - 1 - log r_t >= 0, an estimate of KL(old || new)
    (Schulman 2020); `clip_high`, `clip_low`, `clip_dual`, tokens that were clipped. Divided by the number of tokens
    over all micro-batches and ranks they are means and shares.
    """

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
) -> PolicyLoss:
    """Policy loss of L tokens; all tensors [L], `owner` int64, the others float32. Only `log_probs` gets a gradient.

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
    return PolicyLoss(loss=(losses * weights).sum(), sums=sums)


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
