"""The kernels of rollouts in Triton's interpreter; test_rollout_kernels.py runs these in a process of their own.

Shared-prompt decoding against attention request by request in fp32, draws against Philox on Python's integers.
"""

import itertools

import torch

from verl.rollout.draw_kernel import draw_tokens
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


def members(batch: VirtualBatch) -> list[list[int]]:
    """Requests of each group that is there."""
    bounds = batch.starts[: batch.num_groups + 1].tolist()
    groups = [batch.queries[start:end].tolist() for start, end in itertools.pairwise(bounds)]
    return [group for group in groups if group]


def test_requests_of_a_prompt_are_one_group_wherever_they_stand():
    table, lengths = make_step(STEPS["members scattered, sizes differ"])
    batch = make_grouping().group(table, lengths)
    assert members(batch) == [[0, 2, 5], [1, 4]]
    assert batch.num_keys[:2].tolist() == [3 * BLOCK, 4 * BLOCK]  # the prompts' blocks, read once
    assert batch.num_keys[batch.num_groups :].tolist() == [5, 1, 9, 5 * BLOCK + 4, 2, 8, 6 * BLOCK + 7]


def test_large_groups_are_split_and_short_beginnings_are_not_shared():
    table, lengths = make_step(STEPS["more members than one group takes"])
    assert members(make_grouping(most_members=4).group(table, lengths)) == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10]]
    table, lengths = make_step([(0, 5), (1, 5), (0, 6)])
    table[1, :1] = table[0, :1]  # as a system prompt would be
    assert members(make_grouping().group(table, lengths)) == [[0, 2]]


def test_the_block_that_is_written_to_is_never_shared_and_rows_that_fill_up_a_graph_have_no_keys():
    """A request whose present token is the first of a block reads the blocks before it; that one itself is its own."""
    table, lengths = make_step([(0, 1), (0, 1), (0, 7), (0, 8)])
    lengths[:2] -= 1  # the present token is the prompt's last
    lengths[2:] = 0
    batch = make_grouping().group(table, lengths)
    assert members(batch) == [[0, 1]]
    assert batch.num_keys[0] == 2 * BLOCK
    assert batch.num_keys[batch.num_groups :].tolist() == [BLOCK, BLOCK, 0, 0]


VOCAB = 301  # no multiple of what the kernel works on at once


def draw(logits: torch.Tensor, seeds: list[int], *, position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and their log-probs as the kernel notes them."""
    table = torch.full((len(seeds), 4), torch.nan)
    rows = torch.tensor([seeds, [position] * len(seeds), list(range(len(seeds)))])
    return draw_tokens(logits, rows, table), table[:, position]


def some_logits(num_rows: int) -> torch.Tensor:
    logits = 2 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, ::7] = -torch.inf  # as forbidden tokens are
    return logits


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 as its authors give it, on Python's integers."""
    for _ in range(10):
        products = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (products[1] >> 32) ^ counter[1] ^ key[0],
            products[1] % 2**32,
            (products[0] >> 32) ^ counter[3] ^ key[1],
            products[0] % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_draws_are_gumbel_max_over_counted_noise_in_any_batch():
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # its known answer
    seeds, position = [7, 2**61 + 12345], 3
    logits = some_logits(len(seeds))
    quarter = -(-VOCAB // 4)
    tokens, log_probs = draw(logits, seeds, position=position)
    for row, seed in enumerate(seeds):
        words = [philox([i, position, 0, 0], [seed % 2**32, seed >> 32]) for i in range(quarter)]
        uniform = torch.tensor(words, dtype=torch.float64).T.reshape(-1)[:VOCAB].add(0.5).div(2**32)
        noise = -torch.log(-torch.log1p(-uniform))
        assert tokens[row] == (logits[row] + noise).argmax()
        assert draw(logits[row : row + 1], [seed], position=position)[0] == tokens[row]
    expected = logits.log_softmax(dim=1)[range(len(seeds)), tokens]
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
