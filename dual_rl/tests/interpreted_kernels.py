"""The kernels of shared-prompt decoding against attention request by request in fp32, in Triton's interpreter.

test_rollout_kernels.py runs this in a process of its own.
"""

import torch

from verl.rollout.shared_prompt.kernels import Grouping, VirtualBatch, gather_queries, merge_parts

BLOCK, WIDTH, LEAST = 4, 12, 8
HEADS, KV_HEADS, SIZE = 4, 2, 8
NUM_BLOCKS = 200


def make_step(prompts: list[tuple[int, int]], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Block table and lengths of a step. `prompts`: for each request the number of its prompt and its own tokens.

    Prompt p has 3 + p % 4 blocks, which its requests share; every request goes on in blocks of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    free = (1 + torch.randperm(NUM_BLOCKS - 1, generator=generator)).tolist()
    shared = {prompt: [free.pop() for _ in range(3 + prompt % 4)] for prompt in sorted({p for p, _ in prompts})}
    table, lengths = torch.zeros(len(prompts), WIDTH, dtype=torch.int32), []
    for row, (prompt, own) in enumerate(prompts):
        blocks = shared[prompt] + [free.pop() for _ in range(-(-own // BLOCK))]
        table[row, : len(blocks)] = torch.tensor(blocks)
        lengths.append(len(shared[prompt]) * BLOCK + own)
    return table, torch.tensor(lengths, dtype=torch.int32)


def make_grouping(*, most_members: int = 16) -> Grouping:
    device = torch.device("cpu")
    return Grouping(32, width=WIDTH, block_size=BLOCK, least_tokens=LEAST, most_members=most_members, device=device)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query [heads, size] over [tokens, kv_heads, size], and its log-sum-exp [heads], in fp32."""
    keys = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    values = values.repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("hd,thd->ht", query, keys) / SIZE**0.5
    return torch.einsum("ht,thd->hd", scores.softmax(dim=1), values), scores.logsumexp(dim=1)


def read_cache(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [length, kv_heads, size] of a cache [blocks, 2, block, kv_heads, size]."""
    keys, values = cache[blocks.long()].transpose(0, 1).reshape(2, -1, KV_HEADS, SIZE)[:, :length]
    return keys, values


def attend_virtually(queries: torch.Tensor, cache: torch.Tensor, batch: VirtualBatch) -> tuple[torch.Tensor, ...]:
    """What the attention call on the device does: every row's queries over the row's keys; elsewhere NaN."""
    parts, lse = torch.full_like(queries, torch.nan), torch.full((HEADS, len(queries)), torch.nan)
    for row, length in enumerate(batch.num_keys.tolist()):
        keys, values = read_cache(cache, batch.block_table[row], length)
        for index in range(*batch.starts[row : row + 2].tolist()):
            parts[index], lse[:, index] = attend(queries[index], keys, values)
    return parts, lse


STEPS = {
    "members scattered, sizes differ": [(0, 5), (1, 1), (0, 9), (2, 4), (1, 2), (0, 8), (3, 7)],
    "one request": [(0, 3)],
    "more members than one group takes": [(0, 1 + i % 7) for i in range(9)] + [(1, 3), (1, 4)],
}


def test_grouped_attention_is_attention_request_by_request():
    """Every step with the same buffers: none leaves anything to the next."""
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(NUM_BLOCKS, 2, BLOCK, KV_HEADS, SIZE, generator=generator)
    grouping = make_grouping(most_members=4)
    for seed, prompts in enumerate(STEPS.values()):
        table, lengths = make_step(prompts, seed=seed)
        queries = torch.randn(len(lengths), HEADS, SIZE, generator=generator)
        batch = grouping.group(table, lengths)
        output = torch.full_like(queries, torch.nan)
        parts, lse = attend_virtually(gather_queries(queries, batch), cache, batch)
        merge_parts(parts, lse, batch, output)
        expected = [
            attend(query, *read_cache(cache, row, length))[0]
            for query, row, length in zip(queries, table, lengths.tolist(), strict=True)
        ]
        torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-5)
        read = int(batch.num_keys.sum())  # blocks that requests share are read once
        assert (read < int(lengths.sum())) == (len(prompts) > 1)
