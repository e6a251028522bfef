"""KL estimates against hand-computed values and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from verl.core.kl import compute_full_kl, compute_kl

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
def test_estimates_equal_hand_computed_values(kind, expected):
    log_probs, ref_log_probs = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0 - LOG2, -1.0 + LOG2, -3.0])
    assert compute_kl(log_probs, ref_log_probs, kind=kind).tolist() == pytest.approx(expected, abs=1e-6)


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


def test_low_var_kl_pulls_back_on_policy_samples_towards_the_reference(distributions):
    """The mean gradient over drawn tokens is that of KL(reference || policy), here by enumerating the vocabulary."""
    policy, reference = distributions
    logits = policy.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    (log_probs.exp().detach() * compute_kl(log_probs, reference, kind="low_var_kl")).sum().backward()
    torch.testing.assert_close(logits.grad, policy.exp() - reference.exp())


def test_only_the_policy_gets_a_gradient():
    log_probs, ref_log_probs = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    compute_kl(log_probs, ref_log_probs, kind="mse").sum().backward()
    assert log_probs.grad.item() == 1.0
    assert ref_log_probs.grad is None


def test_full_kl_equals_torch_distributions_in_value_and_gradient(distributions):
    policy, reference = (values.clone().requires_grad_() for values in distributions)
    found = compute_full_kl(policy.log_softmax(-1), reference.detach())
    expected = kl_divergence(Categorical(logits=policy), Categorical(logits=reference.detach()))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), policy)[0], torch.autograd.grad(expected.sum(), policy)[0]
    )


def test_forbidden_tokens_leave_full_kl_and_its_gradient_alone(distributions):
    policy, reference = distributions
    is_forbidden = torch.tensor([False, True, False, False, True, False, False])
    logits = policy.clone().requires_grad_()
    masked = [x.masked_fill(is_forbidden, -math.inf).log_softmax(-1) for x in (logits, reference)]
    kept = [x[:, ~is_forbidden].log_softmax(-1) for x in (policy, reference)]
    found = compute_full_kl(*masked)
    torch.testing.assert_close(found, compute_full_kl(*kept))
    found.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, is_forbidden] == 0).all()


def test_no_tokens_stay_attached_to_the_graph():
    empty = torch.zeros(0, requires_grad=True)
    assert compute_kl(empty, torch.zeros(0), kind="low_var_kl").sum().requires_grad
