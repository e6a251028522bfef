"""Log-probabilities of drawn tokens straight from hidden states: vocabulary logits never exist as a whole.

Rows are split into chunks, and each chunk's logits live only while it is computed. Logits leave the matrix product in
fp32, also from bf16 operands (rounding them to bf16 would change log-probs by more than an update at a learning rate
of 1e-6 does), and everything after it is fp32.

If only the states are trained (LoRA), the backward pass computes nothing: whatever the loss, the gradient of a
log-prob by its state is a number times (W[label] - softmax @ W) / temperature, which the forward pass computes while
it has the logits. If the language head is trained as well, or the full KL has a gradient, the backward pass recomputes
chunks.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from verl.core.losses import compute_full_kl

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
    is_compiled: bool = False,
) -> TokenLogProbs:
    """Log-probs under softmax(logits / temperature) over the allowed tokens.

    `states`: [L, hidden]. `head_weight`: [vocab, hidden]. `labels`: int64 [L]. `temperature`: 0 (greedy) counts as 1.
    `forbidden_ids`: int64, tokens of probability 0. `is_compiled`: fuse the passes over the logits (torch.compile).
    """
    temperature = temperature or 1.0
    if reference is None and not (head_weight.requires_grad and torch.is_grad_enabled()):
        summarize = _fused_summarize() if is_compiled else _summarize
        scores = _FrozenHead.apply(states, head_weight, labels, temperature, forbidden_ids, summarize)
        return TokenLogProbs(*scores, kl=None)
    pieces = _cut(len(labels), vocab_size=head_weight.shape[0])
    chunks = []
    for piece in pieces:
        arguments = (states[piece], head_weight, labels[piece], temperature, forbidden_ids)
        if reference is not None:
            reference_weight = head_weight if reference.head_weight is None else reference.head_weight
            arguments += (reference.states[piece], reference_weight)
        if len(pieces) > 1 and torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(_chunk(*arguments))
    log_probs, entropy, kl = zip(*chunks, strict=True)
    return TokenLogProbs(torch.cat(log_probs), torch.cat(entropy), None if reference is None else torch.cat(kl))


def _cut(num_labels: int, *, vocab_size: int) -> list[slice]:
    """Chunks of rows, at least one."""
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(start, start + rows) for start in range(0, max(num_labels, 1), rows)]


class _FrozenHead(torch.autograd.Function):
    """(log_probs, entropy), fp32 [L] each, with a gradient by `states` only. `summarize` is `_summarize`."""

    @staticmethod
    def forward(ctx, states, head_weight, labels, temperature: float, forbidden_ids, summarize):
        log_probs, entropy = (states.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
        has_gradient = ctx.needs_input_grad[0]
        directions = torch.empty_like(states) if has_gradient else None  # of each log-prob's gradient
        for piece in _cut(len(labels), vocab_size=head_weight.shape[0]):
            logits = _scaled_logits(states[piece], head_weight, temperature, forbidden_ids)
            dtype = head_weight.dtype if has_gradient else None
            log_probs[piece], entropy[piece], gradient = summarize(logits, labels[piece], dtype)
            if has_gradient:
                directions[piece] = (gradient @ head_weight) / temperature
        ctx.save_for_backward(directions)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _entropy_gradient: None):
        (directions,) = ctx.saved_tensors
        return (gradient.unsqueeze(1) * directions).to(directions.dtype), None, None, None, None, None


def _summarize(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of logits [rows, vocab], fp32: log-probs of the labels and entropy, [rows] each, and the gradient of the former
    by the logits, one-hot less probability, [rows, vocab] in `dtype` (None for no gradient)."""
    normaliser = logits.logsumexp(dim=-1)
    log_probs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normaliser
    probabilities = (logits - normaliser.unsqueeze(1)).exp()
    entropy = normaliser - (probabilities * logits).sum(dim=-1)
    if dtype is None:
        return log_probs, entropy, None
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    return log_probs, entropy, (is_label.float() - probabilities).to(dtype)


@cache
def _fused_summarize():
    return torch.compile(_summarize, dynamic=True)


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
