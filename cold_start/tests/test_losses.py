"""Losses against values worked out by hand, and what they promise about counts and gradients."""

import math

import pytest
import torch

from losses import LOSS_TYPES, PairLabels, PairMetrics, compute_pair_loss, compute_pair_sums

NAN = math.nan
LOG5 = math.log(5.0)


def softplus(x: float) -> float:
    """-logsigmoid(-x), the building block of every hand-made value here."""
    return math.log1p(math.exp(x))


def make_labels(preference, *, valid=None, score_a=None, score_b=None) -> PairLabels:
    count = len(preference)
    return PairLabels(
        preference=torch.tensor(preference, dtype=torch.float32),
        is_valid=torch.tensor(valid if valid is not None else [True] * count),
        score_a=torch.tensor(score_a if score_a is not None else [NAN] * count),
        score_b=torch.tensor(score_b if score_b is not None else [NAN] * count),
    )


# Four pairs: A better, B better, tie, invalid. Rewards A - B: 1.0, 0.5, -0.4, 9.0.
REWARDS_A = torch.tensor([1.5, 0.5, -0.4, 9.0])
REWARDS_B = torch.tensor([0.5, 0.0, 0.0, 0.0])
LABELS = make_labels(
    [1, -1, 0, 0], valid=[True, True, True, False], score_a=[4.0, 2.0, 3.0, 1.0], score_b=[2.5, 3.0, 3.0, 5.0]
)
EXPECTED = {
    "bt": (softplus(-1.0) + softplus(0.5), 2),
    "btt": (
        softplus(-(1.0 - LOG5))
        + softplus(-(-0.5 - LOG5))
        + softplus(-(-0.4 - LOG5))
        + softplus(-(0.4 - LOG5))
        - math.log(24.0),
        3,
    ),
    "margin": (softplus(-(1.0 - 1.5)) + softplus(-(-0.5 - 1.0)), 2),
    "constant_margin": (softplus(-(1.0 - 0.57)) + softplus(-(-0.5 - 0.57)), 2),
    "scaled": (1.5 * softplus(-1.0) + 1.0 * softplus(0.5), 2),
    "reg": (
        ((1.5 - 1.0) ** 2 + (0.5 + 0.5) ** 2) / 2 + ((0.5 + 1.0) ** 2 + 0.0**2) / 2 + ((-0.4) ** 2 + 0.0) / 2,
        3,
    ),
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_count_equal_hand_computed_values(loss_type):
    expected_sum, expected_count = EXPECTED[loss_type]
    loss = compute_pair_loss(REWARDS_A, REWARDS_B, LABELS, loss_type=loss_type)
    assert loss.item() == pytest.approx(expected_sum, abs=1e-6)
    assert int(LABELS.contributes(loss_type).sum()) == expected_count


def test_tie_model_probabilities_of_win_tie_and_loss_sum_to_one():
    rewards_a, rewards_b = torch.tensor([0.8] * 3), torch.tensor([-0.3] * 3)
    labels = make_labels([1, -1, 0])
    losses = [
        compute_pair_loss(
            rewards_a[i : i + 1], rewards_b[i : i + 1], make_labels([int(labels.preference[i])]), loss_type="btt"
        )
        for i in range(3)
    ]
    assert sum(math.exp(-loss.item()) for loss in losses) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sum_over_parts_equals_sum_over_whole(loss_type):
    whole = compute_pair_loss(REWARDS_A, REWARDS_B, LABELS, loss_type=loss_type)
    parts = 0.0
    for i in range(4):
        labels = PairLabels(**{name: tensor[i : i + 1] for name, tensor in vars(LABELS).items()})
        parts += compute_pair_loss(REWARDS_A[i : i + 1], REWARDS_B[i : i + 1], labels, loss_type=loss_type)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_invalid_pairs_have_no_gradient_even_with_missing_scores(loss_type):
    rewards_a, rewards_b = REWARDS_A.clone().requires_grad_(), REWARDS_B.clone().requires_grad_()
    labels = make_labels(
        [1, -1, 0, 1], valid=[True, True, True, False], score_a=[4, 2, 3, NAN], score_b=[2, 3, 3, NAN]
    )
    compute_pair_loss(rewards_a, rewards_b, labels, loss_type=loss_type).backward()
    assert rewards_a.grad[3] == 0
    assert rewards_b.grad[3] == 0
    assert rewards_a.grad.isfinite().all()


def test_loss_without_pairs_is_a_zero_attached_to_the_graph():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    labels = make_labels([0, 1], valid=[True, False])
    loss = compute_pair_loss(rewards, rewards * 2, labels, loss_type="bt")
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(rewards.grad, torch.zeros(2))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_swapping_sides_changes_no_loss_and_flips_every_gradient(loss_type):
    swapped = PairLabels(-LABELS.preference, LABELS.is_valid, LABELS.score_b, LABELS.score_a)
    gradients = []
    losses = []
    for first, second, labels in ((REWARDS_A, REWARDS_B, LABELS), (REWARDS_B, REWARDS_A, swapped)):
        rewards_a, rewards_b = first.clone().requires_grad_(), second.clone().requires_grad_()
        loss = compute_pair_loss(rewards_a, rewards_b, labels, loss_type=loss_type)
        loss.backward()
        losses.append(loss.item())
        gradients.append((rewards_a.grad, rewards_b.grad))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0][0], gradients[1][1])


def test_metrics_count_only_decided_pairs_and_equal_rewards_as_wrong():
    rewards_a, rewards_b = torch.tensor([2.0, 1.0, 3.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 4.0, 0.0, 0.0])
    labels = make_labels([1, 1, -1, 0, 1], valid=[True, True, True, True, False])
    means = PairMetrics(*compute_pair_sums(rewards_a, rewards_b, labels).tolist()).means()
    assert means["accuracy"] == pytest.approx(2 / 3)
    assert means["chosen_reward"] == pytest.approx((2.0 + 1.0 + 4.0) / 3)
    assert means["rejected_reward"] == pytest.approx((1.0 + 1.0 + 3.0) / 3)
    assert means["margin"] == pytest.approx(2 / 3)
    assert PairMetrics(0, 0, 0, 0).means() == {}
