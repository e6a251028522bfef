"""Per-token estimates of the KL divergence of the policy to the reference model.

`kl`, `abs`, `mse` and `low_var_kl` (Schulman 2020, "Approximating KL divergence": k1, |k1|, k2, k3) need only the
log-probabilities of the tokens that were drawn. As a loss, k1 has a gradient of zero mean and does not pull towards
the reference; it is meant for the reward. `full` sums over the vocabulary.
"""

import torch

from verl.config import KlPenalty

LOG_RATIO_BOUND = 20.0  # log-ratios are clamped to +- this, as in the policy loss
LOW_VAR_KL_BOUND = 10.0  # a single token counts no more than this


def compute_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, *, kind: KlPenalty) -> torch.Tensor:
    """KL estimate per token, float32 [L], from the log-probs of the drawn tokens under policy and reference, [L].

    With d = log pi - log pi_ref: `kl` d; `abs` |d|; `mse` d^2 / 2; `low_var_kl` exp(-d) + d - 1 with d clamped to
    +-20 and the result to at most 10 (no gradient beyond either). `full` has `compute_full_kl`.
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
