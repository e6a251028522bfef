"""Pairs over ranks: every pair once, and loads close to the best there is."""

from itertools import product

import numpy as np
import pytest

from verl.core.balancing import balance_pairs


def heaviest(num_tokens, partition) -> int:
    return max(sum(num_tokens[index] for index in indices) for indices in partition)


@pytest.mark.parametrize(("num_pairs", "num_ranks"), [(0, 2), (1, 8), (5, 3), (64, 8), (5, 1)])
def test_every_pair_goes_to_exactly_one_rank(num_pairs, num_ranks):
    num_tokens = np.random.default_rng(num_pairs).integers(100, 4000, num_pairs).tolist()
    partition = balance_pairs(num_tokens, num_ranks)
    assert len(partition) == num_ranks
    assert sorted(index for indices in partition for index in indices) == list(range(num_pairs))
    assert all(indices == sorted(indices) for indices in partition)
    assert sum(map(bool, partition)) == min(num_pairs, num_ranks)


def test_loads_are_close_to_the_best():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_tokens = rng.integers(100, 1000, 7).tolist()
        loads = (max(np.bincount(ranks, weights=num_tokens, minlength=3)) for ranks in product(range(3), repeat=7))
        assert heaviest(num_tokens, balance_pairs(num_tokens, 3)) <= 1.1 * min(loads)
    num_tokens = rng.integers(2000, 12000, 128).tolist()
    assert heaviest(num_tokens, balance_pairs(num_tokens, 8)) < 1.005 * sum(num_tokens) / 8


def test_examples():
    assert balance_pairs((8, 7, 6, 5, 4), 2) == [[0, 2], [1, 3, 4]]  # of the docstring
    assert sorted(balance_pairs([1000, 1, 0, 1], 4)) == [[0], [1], [2], [3]]  # none empty beside a huge pair
    assert sorted(map(len, balance_pairs([7] * 12, 4))) == [3, 3, 3, 3]
