"""Bradley-Terry against hand-computed values, stage 1's loss, and what it promises about counts and gradients."""

import math
import random

import pytest
import torch

from losses import PairLabels
from losses import compute_pair_loss as stage1_pair_loss
from verl.core.losses import LossSums, compute_pair_loss
from verl.types import ResponseKey

# Differences A - B: 1.0 preferred, 0.5 against, tie, unlabelled, 0.0 preferred.
REWARDS_A = [1.5, 0.5, 3.0, 9.0, 2.0]
REWARDS_B = [0.5, 0.0, 0.0, -9.0, 2.0]
PREFERENCES = [1, -1, 0, None, 1]
KEYS = [ResponseKey(pair_id, side, 0) for side in "AB" for pair_id in range(5)]


def make_rewards() -> torch.Tensor:
    """Of KEYS."""
    return torch.tensor(REWARDS_A + REWARDS_B, requires_grad=True)


def loss_of(rewards: torch.Tensor, order=range(10)) -> LossSums:
    order = list(order)
    return compute_pair_loss(rewards[order], [KEYS[index] for index in order], dict(enumerate(PREFERENCES)))


def test_loss_sums_and_gradient_equal_hand_computed_values_in_any_order():
    order = list(range(10))
    for _ in range(3):
        rewards = make_rewards()
        result = loss_of(rewards, order)
        result.loss.backward()
        softplus = [math.log1p(math.exp(x)) for x in (-1.0, 0.5, 0.0)]
        assert result.loss.item() == pytest.approx(sum(softplus), abs=1e-6)
        assert result.sums["num_correct"].item() == 1  # equal rewards are wrong
        assert result.sums["chosen_reward"].item() == pytest.approx(1.5 + 0.0 + 2.0)
        assert result.sums["rejected_reward"].item() == pytest.approx(0.5 + 0.5 + 2.0)
        assert not result.sums["chosen_reward"].requires_grad
        expected = [-1 / (1 + math.e), 1 / (1 + math.exp(-0.5)), 0.0, 0.0, -0.5]
        assert rewards.grad.tolist() == pytest.approx(expected + [-value for value in expected], abs=1e-6)
        random.Random(0).shuffle(order)


def test_loss_is_that_of_stage_1():
    labels = PairLabels(
        preference=torch.tensor([float(preference or 0) for preference in PREFERENCES]),
        is_valid=torch.tensor([preference is not None for preference in PREFERENCES]),
        score_a=torch.full((5,), math.nan),
        score_b=torch.full((5,), math.nan),
    )
    expected = stage1_pair_loss(*make_rewards().split(5), labels, loss_type="bt")
    assert loss_of(make_rewards()).loss.item() == expected.item()


@pytest.mark.parametrize("order", [[], [2, 3, 7, 8]], ids=["no pairs", "no decided pairs"])
def test_without_decided_pairs_the_loss_is_a_zero_attached_to_the_graph(order):
    rewards = make_rewards()
    result = loss_of(rewards, order)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.sums["chosen_reward"].item() == 0
    assert rewards.grad.tolist() == [0.0] * 10


def test_incomplete_or_repeated_responses_are_refused():
    a, b = ResponseKey(0, "A", 0), ResponseKey(0, "B", 0)
    for keys in ([a], [b], [a, b._replace(sample=1)], [a, b._replace(pair_id=1)]):
        with pytest.raises(AssertionError, match="without their partner"):
            compute_pair_loss(torch.zeros(len(keys)), keys, {0: 1, 1: 1})
    with pytest.raises(AssertionError, match="occurs twice"):
        compute_pair_loss(torch.zeros(3), [a, b, a], {0: 1})
