"""Log-probabilities of drawn tokens straight from hidden states: vocabulary logits never exist as a whole.

Rows are cut into chunks; each chunk's logits live only while it is computed, and again in the backward pass, where
they are recomputed. Logits leave the matrix product in fp32 (also from bf16 operands: rounding them to bf16 would move
log-probs by more than an update at a learning rate of 1e-6 does), and everything after it is fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from verl.core.kl import compute_full_kl

CHUNK_ELEMENTS = 2**27  # logits at a time: half a GiB in fp32, 883 rows of Qwen3-VL's vocabulary
FORBIDDEN_LOGIT = -1e30  # finite, so that p * log p of a forbidden token is 0 and not NaN


class Distributions(NamedTuple):
    """Distributions over the vocabulary at L labels, as the two factors of their logits: [L, vocab] never exists.

    `states`: [L, hidden], a model's final hidden states at the label positions. `head_weight`: [vocab, hidden], its
    language head, or None where that of the policy serves (LoRA does not adapt the head).
    """

    states: torch.Tensor
    head_weight: torch.Tensor | None = None


class TokenLogProbs(NamedTuple):
    """fp32 [L] each. `log_probs`: of the labels. `entropy`: of the distributions, without gradient, in nats.

    `kl`: KL(policy || reference) over the whole vocabulary, with gradient; None without a reference.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None


def compute_token_log_probs(
    states: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    forbidden_ids: torch.Tensor,
    reference: Distributions | None = None,
) -> TokenLogProbs:
    """Log-probs under softmax(logits / temperature) over the allowed tokens.

    `states`: [L, hidden]. `head_weight`: [vocab, hidden]. `labels`: int64 [L]. `temperature`: 0 (greedy) counts as 1.
    `forbidden_ids`: int64, tokens of probability 0.
    """
    temperature = temperature or 1.0
    rows = max(1, CHUNK_ELEMENTS // head_weight.shape[0])
    starts = range(0, max(len(labels), 1), rows)
    chunks = []
    for start in starts:
        piece = slice(start, start + rows)
        arguments = (states[piece], head_weight, labels[piece], temperature, forbidden_ids)
        if reference is not None:
            reference_weight = head_weight if reference.head_weight is None else reference.head_weight
            arguments += (reference.states[piece], reference_weight)
        if len(starts) > 1 and torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(_chunk(*arguments))
    log_probs, entropy, kl = zip(*chunks, strict=True)
    return TokenLogProbs(torch.cat(log_probs), torch.cat(entropy), None if reference is None else torch.cat(kl))


def _chunk(
    states: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    forbidden_ids: torch.Tensor,
    *reference: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    logits = _scaled_logits(states, head_weight, temperature, forbidden_ids)
    normaliser = logits.logsumexp(dim=-1)
    log_probs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normaliser
    with torch.no_grad():
        probabilities = (logits - normaliser.unsqueeze(1)).exp_()
        entropy = normaliser - torch.einsum("lv,lv->l", probabilities, logits)
    if not reference:
        return log_probs, entropy, None
    with torch.no_grad():
        reference_logits = _scaled_logits(*reference, temperature, forbidden_ids)
        reference_log_probs = reference_logits - reference_logits.logsumexp(dim=-1, keepdim=True)
    policy_log_probs = logits - normaliser.unsqueeze(1)
    return log_probs, entropy, compute_full_kl(policy_log_probs, reference_log_probs)


def _scaled_logits(
    states: torch.Tensor, head_weight: torch.Tensor, temperature: float, forbidden_ids: torch.Tensor
) -> torch.Tensor:
    logits = _LinearToFloat32.apply(states, head_weight)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.index_fill_(1, forbidden_ids, FORBIDDEN_LOGIT)


class _LinearToFloat32(torch.autograd.Function):
    """states [L, hidden] times weight [vocab, hidden] transposed, in fp32 whatever the dtype of the operands."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        if states.dtype == torch.float32 and weight.dtype == torch.float32:
            return F.linear(states, weight)
        if states.is_cuda and states.dtype == weight.dtype:
            return torch.mm(states, weight.t(), out_dtype=torch.float32)
        return F.linear(states.float(), weight.float())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight = ctx.needs_input_grad
        gradient = gradient.to(weight.dtype)
        return (
            (gradient @ weight).to(states.dtype) if needs_states else None,
            gradient.t() @ states.to(weight.dtype) if needs_weight else None,
        )
