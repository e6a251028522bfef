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
        preference=column(map(float, preference)),
        is_valid=column(valid or [True] * count),
        score_a=column(score_a or [NAN] * count),
        score_b=column(score_b or [NAN] * count),
    )


def column(values) -> torch.Tensor:
    """Of one dimension."""
    return torch.tensor(list(values)).unsqueeze(1)


# Four pairs: A better, B better, tie, invalid. Rewards A - B: 1.0, 0.5, -0.4, 9.0.
REWARDS_A = column([1.5, 0.5, -0.4, 9.0])
REWARDS_B = column([0.5, 0.0, 0.0, 0.0])
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
    rewards = column([0.8]), column([-0.3])
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
    loss, gradient, _ = loss_and_gradients(column([1.0, 2.0]), column([2.0, 4.0]), labels, "bt")
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros(2, 1))


def test_metrics_count_only_decided_pairs_and_equal_rewards_as_wrong():
    rewards_a, rewards_b = column([2.0, 1.0, 3.0, 0.0, 5.0]), column([1.0, 1.0, 4.0, 0.0, 0.0])
    labels = make_labels([1, 1, -1, 0, 1], valid=[True, True, True, True, False])
    means = compute_means(compute_pair_sums(torch.tensor(6.0), rewards_a, rewards_b, labels, loss_type="bt"), ["GSB"])
    assert means == pytest.approx(
        {
            "loss": 2.0,
            "accuracy": 2 / 3,
            "chosen_reward": (2.0 + 1.0 + 4.0) / 3,
            "rejected_reward": (1.0 + 1.0 + 3.0) / 3,
            "margin": 2 / 3,
        }
    )
    assert compute_means(torch.zeros(6), ["GSB"]) == {"loss": 0.0}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_pair_counts_once_however_many_dimensions_label_it(loss_type):
    """Of two dimensions, the second labels the first two pairs only."""
    second = make_labels([-1, 1, 0, 0], valid=[True, True, False, False], score_a=[1.0] * 4, score_b=[2.0, 0.5, 1, 1])
    labels = PairLabels(**{name: torch.cat([a, vars(second)[name]], dim=1) for name, a in vars(LABELS).items()})
    rewards = [torch.cat([one, one + shift], dim=1) for one, shift in ((REWARDS_A, 0.3), (REWARDS_B, -0.2))]
    loss = compute_pair_loss(*rewards, labels, loss_type=loss_type)
    expected = torch.zeros(())
    for pair in range(4):
        losses = [
            compute_pair_loss(*(r[[pair], d : d + 1] for r in rewards), one, loss_type=loss_type)
            for d in range(2)
            if (one := PairLabels(**{n: t[[pair], d : d + 1] for n, t in vars(labels).items()})).contributes(loss_type)
        ]
        expected += torch.stack(losses).mean() if losses else 0.0
    torch.testing.assert_close(loss, expected)
    means = compute_means(compute_pair_sums(loss, *rewards, labels, loss_type=loss_type), ["VQ", "MQ"])
    assert means["loss"] == pytest.approx(loss.item() / EXPECTED[loss_type][1])
    assert means["accuracy/VQ"] == 0.5
    assert means["accuracy/MQ"] == 0.5
