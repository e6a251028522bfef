"""One kernel that draws the next token of every row: Gumbel noise by a counter, no state.

The noise of a token is a function of the row's seed, the position of the draw and the token's id (Philox 4x32-10,
Salmon et al. 2011), so a draw is the same in any batch and on any rank. argmax(logit + noise) is a draw from the
softmax (Gumbel-max), and the same pass over the logits sums the softmax's denominator.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024
LOWEST = tl.constexpr(-1e30)
"""Below every logit, but finite: differences of it are numbers."""


@triton.jit
def _gumbel_noise(words):
    """-log(-log(1 - u)) for u = (words + 1/2) / 2^32. Small u, which make the large values, are kept to full
    precision: 1 - u would round them away, and rare tokens would be drawn too seldom."""
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 0.00390625, u * (1.0 + u * (0.5 + u * 0.3333333)), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _draw_kernel(logits, stride, rows, num_rows, tokens, table, width, vocab, quarter, block: tl.constexpr):
    """One row a program. Token q * quarter + i takes word q of the four that Philox makes of counter (i, position)."""
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(rows + row)
    position = tl.load(rows + num_rows + row)
    slot = tl.load(rows + 2 * num_rows + row)
    lane = tl.arange(0, block)
    best = tl.full((block,), float("-inf"), tl.float32)  # of logit + noise, with the token and its logit
    best_token = tl.zeros((block,), tl.int32)
    best_logit = tl.full((block,), LOWEST, tl.float32)
    largest = tl.full((block,), LOWEST, tl.float32)  # of the logits, and the sum of exp(logit - largest)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, quarter, block):
        index = start + lane
        words = tl.randint4x(seed, (position << 32) | index.to(tl.int64))
        for part in tl.static_range(4):
            token = part * quarter + index
            inside = (index < quarter) & (token < vocab)
            logit = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
            score = logit + _gumbel_noise(words[part])
            is_better = score > best
            best = tl.where(is_better, score, best)
            best_token = tl.where(is_better, token, best_token)
            best_logit = tl.where(is_better, logit, best_logit)
            higher = tl.maximum(largest, logit)
            total = total * tl.exp(largest - higher) + tl.exp(logit - higher)
            largest = higher
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, best_token, vocab), 0)
    logit = tl.max(tl.where(best_token == token, best_logit, LOWEST), 0)
    highest = tl.max(largest, 0)
    log_prob = logit - highest - tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(table + slot * width + position, log_prob, mask=(slot >= 0) & (position < width))


def draw_tokens(logits: torch.Tensor, rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [num_rows], drawn from softmax(logits); their log-probs are written to `table`.

    `logits`: [num_rows, vocab], -inf for what must not be drawn. `rows`: int64 [3, num_rows], for each row its seed,
    the position of the draw in its response, and its row of `table`, negative for none. `table`: float32 [any, width];
    log-probs are written at the draw's position, where that is less than `width`.
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1, f"logits have a stride of {logits.stride(1)} over the vocabulary"
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    arguments = (logits, logits.stride(0), rows, num_rows, tokens, table, table.shape[1], vocab)
    _draw_kernel[(num_rows,)](*arguments, triton.cdiv(vocab, 4), block=BLOCK, num_warps=32)
    return tokens
