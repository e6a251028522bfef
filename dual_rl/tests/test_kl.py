"""KL estimates against hand-computed values and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from verl.core.losses import compute_full_kl, compute_kl

LOG2 = math.log(2.0)


@pytest.fixture
def distributions():
    """Log-probabilities [3, 7] of two categorical distributions."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 3, 7, dtype=torch.float64) * 0.7  # within the clamps
    return policy.log_softmax(-1), reference.log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [LOG2, -LOG2, 0.0]),
        ("abs", [LOG2, LOG2, 0.0]),
        ("mse", [LOG2**2 / 2, LOG2**2 / 2, 0.0]),
        ("low_var_kl", [0.5 - 1 + LOG2, 2 - 1 - LOG2, 0.0]),
    ],
)
def test_estimates_equal_hand_computed_values_and_only_the_policy_gets_a_gradient(kind, expected):
    log_probs = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    reference = torch.tensor([-1.0 - LOG2, -1.0 + LOG2, -3.0], requires_grad=True)
    found = compute_kl(log_probs, reference, kind=kind)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    assert log_probs.grad.count_nonzero() >= 2
    assert reference.grad is None


@pytest.mark.parametrize("kind", ["kl", "low_var_kl"])
def test_expectation_over_all_tokens_is_the_divergence(kind, distributions):
    policy, reference = distributions
    expected = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    estimate = (policy.exp() * compute_kl(policy, reference, kind=kind)).sum(-1)
    torch.testing.assert_close(estimate, expected)


def test_low_var_kl_is_never_negative_and_bounded():
    difference = torch.linspace(-100, 100, 401)
    estimate = compute_kl(difference, torch.zeros_like(difference), kind="low_var_kl")
    assert estimate.min().item() == 0.0
    assert estimate.max().item() == 10.0
    assert estimate[difference == 5.0].item() == pytest.approx(math.exp(-5) + 4, rel=1e-6)


def test_full_kl_and_its_gradient_equal_torch_distributions_over_the_allowed_tokens(distributions):
    policy, reference = (values.clone().requires_grad_() for values in distributions)
    is_allowed = torch.tensor([True, False, True, True, False, True, True])
    ours, theirs = (x.masked_fill(~is_allowed, -math.inf).log_softmax(-1) for x in (policy, reference.detach()))
    found = compute_full_kl(ours, theirs)
    kept = [Categorical(logits=x[:, is_allowed]) for x in (policy, reference.detach())]
    expected = kl_divergence(*kept)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(kl.sum(), policy)[0] for kl in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][:, ~is_allowed] == 0).all()
