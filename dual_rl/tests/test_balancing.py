"""Pairs over ranks: every pair once, and loads close to the best there is."""

from itertools import product

import numpy as np
import pytest

from verl.core.balancing import balance_pairs


def heaviest(num_tokens, partition) -> int:
    return max(sum(num_tokens[index] for index in indices) for indices in partition)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_pairs", [0, 1, 5, 64])
def test_every_pair_goes_to_exactly_one_rank(num_pairs, num_ranks):
    num_tokens = np.random.default_rng(num_pairs).integers(100, 4000, num_pairs).tolist()
    partition = balance_pairs(num_tokens, num_ranks)
    assert len(partition) == num_ranks
    assert sorted(index for indices in partition for index in indices) == list(range(num_pairs))
    assert all(indices == sorted(indices) for indices in partition)
    assert sum(map(bool, partition)) == min(num_pairs, num_ranks)
    assert partition == balance_pairs(num_tokens, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_loads_are_within_a_tenth_of_the_best(num_ranks):
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_tokens = rng.integers(100, 1000, 7).tolist()
        best = min(
            max(np.bincount(ranks, weights=num_tokens, minlength=num_ranks))
            for ranks in product(range(num_ranks), repeat=7)
        )
        assert heaviest(num_tokens, balance_pairs(num_tokens, num_ranks)) <= 1.1 * best


def test_many_pairs_balance_almost_perfectly():
    num_tokens = np.random.default_rng(1).integers(2000, 12000, 128).tolist()
    assert heaviest(num_tokens, balance_pairs(num_tokens, 8)) < 1.005 * sum(num_tokens) / 8


def test_equal_pairs_are_dealt_out_equally():
    assert sorted(map(len, balance_pairs([7] * 12, 4))) == [3, 3, 3, 3]


def test_no_rank_is_empty_beside_one_huge_pair():
    assert sorted(balance_pairs([1000, 1, 0, 1], 4)) == [[0], [1], [2], [3]]


def test_example_of_the_docstring():
    assert balance_pairs((8, 7, 6, 5, 4), 2) == [[0, 2], [1, 3, 4]]
