"""Bradley-Terry against hand-computed values, stage 1's loss, and what it promises about counts and gradients."""

import math
import random

import pytest
import torch

from losses import PairLabels
from losses import compute_pair_loss as stage1_pair_loss
from verl.core.pair_loss import PairLoss, compute_pair_loss, encode_preferences, index_pairs
from verl.types import ResponseKey

# Differences A - B: 1.0 preferred, 0.5 against, tie, unlabelled, 0.0 preferred.
REWARDS_A = [1.5, 0.5, 3.0, 9.0, 2.0]
REWARDS_B = [0.5, 0.0, 0.0, -9.0, 2.0]
PREFERENCES = [1, -1, 0, None, 1]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def loss_of(rewards_a, rewards_b, preferences) -> PairLoss:
    return compute_pair_loss(rewards_a, rewards_b, preferences=encode_preferences(preferences))


def make_rewards():
    return torch.tensor(REWARDS_A, requires_grad=True), torch.tensor(REWARDS_B, requires_grad=True)


def test_sums_equal_hand_computed_values():
    result = loss_of(*make_rewards(), PREFERENCES)
    assert result.loss.item() == pytest.approx(softplus(-1.0) + softplus(0.5) + softplus(0.0), abs=1e-6)
    assert result.sums["num_correct"].item() == 1  # equal rewards are wrong
    assert result.sums["chosen_reward"].item() == pytest.approx(1.5 + 0.0 + 2.0)
    assert result.sums["rejected_reward"].item() == pytest.approx(0.5 + 0.5 + 2.0)
    assert not result.sums["chosen_reward"].requires_grad


def test_gradient_pushes_apart_decided_pairs_only():
    rewards_a, rewards_b = make_rewards()
    loss_of(rewards_a, rewards_b, PREFERENCES).loss.backward()
    expected = [-1 / (1 + math.e), 1 / (1 + math.exp(-0.5)), 0.0, 0.0, -0.5]
    assert rewards_a.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert rewards_b.grad.tolist() == pytest.approx([-value for value in expected], abs=1e-6)


def test_loss_is_that_of_stage_1():
    rewards_a, rewards_b = make_rewards()
    labels = PairLabels(
        preference=torch.tensor([float(preference or 0) for preference in PREFERENCES]),
        is_valid=torch.tensor([preference is not None for preference in PREFERENCES]),
        score_a=torch.full((5,), math.nan),
        score_b=torch.full((5,), math.nan),
    )
    expected = stage1_pair_loss(rewards_a, rewards_b, labels, loss_type="bt")
    assert loss_of(rewards_a, rewards_b, PREFERENCES).loss.item() == expected.item()


def test_bt_gradient_is_independent_of_micro_batch_size():
    whole_a, whole_b = make_rewards()
    loss_of(whole_a, whole_b, PREFERENCES).loss.div(3).backward()
    for size in (1, 2, 3):
        rewards_a, rewards_b = make_rewards()
        for start in range(0, 5, size):
            part = slice(start, start + size)
            loss_of(rewards_a[part], rewards_b[part], PREFERENCES[part]).loss.div(3).backward()
        torch.testing.assert_close(rewards_a.grad, whole_a.grad)
        torch.testing.assert_close(rewards_b.grad, whole_b.grad)


@pytest.mark.parametrize("preferences", [[], [0, None]])
def test_without_decided_pairs_the_loss_is_a_zero_attached_to_the_graph(preferences):
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    result = loss_of(rewards[: len(preferences)], rewards[: len(preferences)], preferences)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.sums["chosen_reward"].item() == 0
    assert rewards.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_responses_find_their_partner_and_label_in_any_order(seed):
    """The reward of each response names it, so that the loss tells which were paired."""
    keys = [ResponseKey(pair_id, side, sample) for pair_id in (4, 9, 2) for side in "AB" for sample in range(3)]
    random.Random(seed).shuffle(keys)
    index = index_pairs(keys)
    assert sorted(index.a.tolist() + index.b.tolist()) == list(range(18))
    for a, b, pair_id in zip(index.a, index.b, index.pair_ids, strict=True):
        assert keys[a] == (pair_id, "A", keys[a].sample)
        assert keys[b] == (pair_id, "B", keys[a].sample)
    assert [index_pairs([]).a.dtype, index_pairs([]).pair_ids] == [torch.long, ()]


def test_incomplete_or_repeated_responses_are_refused():
    a, b = ResponseKey(0, "A", 0), ResponseKey(0, "B", 0)
    for keys in ([a], [b], [a, b._replace(sample=1)], [a, b._replace(pair_id=1)]):
        with pytest.raises(AssertionError, match="without their partner"):
            index_pairs(keys)
    with pytest.raises(AssertionError, match="occurs twice"):
        index_pairs([a, b, a])
