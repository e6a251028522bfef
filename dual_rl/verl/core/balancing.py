"""Whole pairs over ranks, so that all compute about as many tokens (Karmarkar and Karp's differencing method)."""

import heapq
from collections.abc import Sequence

from verl.types import PairRollout


def balance_pairs(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of the pairs of each rank, every index once and ascending within a rank.

    `num_tokens`: tokens of each pair. One rank may get more pairs than another, but none stays empty if there are as
    many pairs as ranks. Deterministic.

    Example: tokens (8, 7, 6, 5, 4) over two ranks give [[0, 2], [1, 3, 4]], loads 14 and 16.
    """
    # An entry is a partition into num_ranks loads, sorted by load. The two with the largest spread are merged, the
    # heaviest part of one with the lightest of the other.
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for index, tokens in enumerate(num_tokens):
        parts = [(0, [])] * (num_ranks - 1) + [(tokens, [index])]
        heap.append((-tokens, index, parts))
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [
            (load + other_load, indices + other_indices)
            for (load, indices), (other_load, other_indices) in zip(first, reversed(second), strict=True)
        ]
        merged.sort(key=lambda part: (part[0], part[1]))
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], order, merged))
        order += 1
    parts = heap[0][2] if heap else [(0, [])] * num_ranks
    return [sorted(indices) for _, indices in parts]


def distribute_pairs(
    rollouts: Sequence[PairRollout], *, mini_batch_size: int, num_ranks: int, ulysses_size: int = 1
) -> list[list[list[PairRollout]]]:
    """Every rank's pairs by mini-batch: whole pairs, balanced by tokens within each run of `mini_batch_size` pairs.

    `ulysses_size`: the number of neighbouring ranks that share each row and get the same pairs. With fewer pairs than
    ranks, a mini-batch is empty on some ranks.
    """
    groups: list[list[list[PairRollout]]] = [[] for _ in range(num_ranks // ulysses_size)]
    for start in range(0, len(rollouts), mini_batch_size):
        mini_batch = rollouts[start : start + mini_batch_size]
        assignment = balance_pairs([rollout.num_tokens for rollout in mini_batch], len(groups))
        for mini_batches, indices in zip(groups, assignment, strict=True):
            mini_batches.append([mini_batch[index] for index in indices])
    return [groups[rank // ulysses_size] for rank in range(num_ranks)]
