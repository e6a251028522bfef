"""Losses against values computed by hand, and what they promise about counts and gradients."""

import math

import pytest
import torch

from losses import LOSS_TYPES, PairLabels, compute_means, compute_pair_loss, compute_pair_sums

NAN = math.nan
LOG5 = math.log(5.0)


def softplus(x: float) -> float:
    """-logsigmoid(-x), the building block of every hand-made value here."""
    return math.log1p(math.exp(x))


def make_labels(preference, *, valid=None, score_a=None, score_b=None) -> PairLabels:
    count = len(preference)
    return PairLabels(
        preference=torch.tensor(preference, dtype=torch.float32),
        is_valid=torch.tensor(valid or [True] * count),
        score_a=torch.tensor(score_a or [NAN] * count),
        score_b=torch.tensor(score_b or [NAN] * count),
    )


# Four pairs: A better, B better, tie, invalid. Rewards A - B: 1.0, 0.5, -0.4, 9.0.
REWARDS_A = torch.tensor([1.5, 0.5, -0.4, 9.0])
REWARDS_B = torch.tensor([0.5, 0.0, 0.0, 0.0])
LABELS = make_labels(
    [1, -1, 0, 0], valid=[True, True, True, False], score_a=[4.0, 2.0, 3.0, NAN], score_b=[2.5, 3.0, 3.0, NAN]
)
DECIDED_BTT = softplus(-(1.0 - LOG5)) + softplus(-(-0.5 - LOG5))
TIED_BTT = softplus(-(-0.4 - LOG5)) + softplus(-(0.4 - LOG5)) - math.log(24.0)
EXPECTED = {  # sum and number of pairs
    "bt": (softplus(-1.0) + softplus(0.5), 2),
    "btt": (DECIDED_BTT + TIED_BTT, 3),
    "margin": (softplus(-(1.0 - 1.5)) + softplus(-(-0.5 - 1.0)), 2),
    "constant_margin": (softplus(-(1.0 - 0.57)) + softplus(-(-0.5 - 0.57)), 2),
    "scaled": (1.5 * softplus(-1.0) + 1.0 * softplus(0.5), 2),
    "reg": (((1.5 - 1.0) ** 2 + (0.5 + 0.5) ** 2 + (0.5 + 1.0) ** 2 + 0.0**2 + (-0.4) ** 2) / 2, 3),
}


def loss_and_gradients(rewards_a, rewards_b, labels, loss_type) -> tuple[float, torch.Tensor, torch.Tensor]:
    rewards_a, rewards_b = rewards_a.clone().requires_grad_(), rewards_b.clone().requires_grad_()
    loss = compute_pair_loss(rewards_a, rewards_b, labels, loss_type=loss_type)
    loss.backward()
    return loss.item(), rewards_a.grad, rewards_b.grad


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_count_equal_hand_computed_values(loss_type):
    expected_sum, expected_count = EXPECTED[loss_type]
    loss, *gradients = loss_and_gradients(REWARDS_A, REWARDS_B, LABELS, loss_type)
    assert loss == pytest.approx(expected_sum, abs=1e-6)
    assert int(LABELS.contributes(loss_type).sum()) == expected_count
    for gradient in gradients:  # the invalid pair has none, though its scores are missing
        assert gradient[3] == 0
        assert gradient.isfinite().all()


def test_tie_model_probabilities_of_win_tie_and_loss_sum_to_one():
    rewards = torch.tensor([0.8]), torch.tensor([-0.3])
    losses = [compute_pair_loss(*rewards, make_labels([label]), loss_type="btt").item() for label in (1, 0, -1)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sums_over_parts_equal_sums_over_the_whole(loss_type):
    def sums(part: slice) -> torch.Tensor:
        labels = PairLabels(**{name: tensor[part] for name, tensor in vars(LABELS).items()})
        pairs = (REWARDS_A[part], REWARDS_B[part], labels)
        loss = compute_pair_loss(*pairs, loss_type=loss_type)
        return compute_pair_sums(loss, *pairs, loss_type=loss_type)

    torch.testing.assert_close(sum(sums(slice(i, i + 1)) for i in range(4)), sums(slice(4)), rtol=0, atol=1e-6)


def test_loss_without_pairs_is_a_zero_attached_to_the_graph():
    labels = make_labels([0, 1], valid=[True, False])
    loss, gradient, _ = loss_and_gradients(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), labels, "bt")
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros(2))


def test_metrics_count_only_decided_pairs_and_equal_rewards_as_wrong():
    rewards_a, rewards_b = torch.tensor([2.0, 1.0, 3.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 4.0, 0.0, 0.0])
    labels = make_labels([1, 1, -1, 0, 1], valid=[True, True, True, True, False])
    means = compute_means(compute_pair_sums(torch.tensor(6.0), rewards_a, rewards_b, labels, loss_type="bt"))
    assert means == pytest.approx(
        {
            "loss": 2.0,
            "accuracy": 2 / 3,
            "chosen_reward": (2.0 + 1.0 + 4.0) / 3,
            "rejected_reward": (1.0 + 1.0 + 3.0) / 3,
            "margin": 2 / 3,
        }
    )
    assert compute_means(torch.zeros(6)) == {"loss": 0.0}
