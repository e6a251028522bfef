"""Policy losses against hand-computed values and a token-by-token reference."""

import math

import pytest
import torch

from verl.config import ActorConfig
from verl.core.losses import (
    LossSums,
    compute_importance_weights,
    compute_policy_loss,
    compute_token_weights,
)

KINDS = ["default", "gspo", "gspo_token", "cispo"]
OWNER = torch.arange(4).repeat_interleave(torch.tensor([3, 1, 4, 2]))
WEIGHTS = compute_token_weights(OWNER, mode="seq", num_tokens=10, num_responses=4).double()


def policy_loss(log_probs, old, advantages, owner=OWNER, weights=WEIGHTS, *, kind="default") -> LossSums:
    return compute_policy_loss(
        log_probs,
        old_log_probs=torch.as_tensor(old),
        advantages=torch.as_tensor(advantages),
        owner=torch.as_tensor(owner),
        weights=torch.as_tensor(weights),
        settings=ActorConfig(loss_type=kind),
    )


def make_inputs():
    """Log-probs, old log-probs and advantages per token of four responses, float64."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(len(OWNER), generator=generator, dtype=torch.float64) * 3
    log_probs = (old + torch.randn(len(OWNER), generator=generator, dtype=torch.float64) * 0.5).requires_grad_()
    return log_probs, old, torch.tensor([1.5, -0.5, -2.0, 0.0], dtype=torch.float64)[OWNER]


def reference_loss(log_probs, old, advantages, *, kind) -> float:
    """Formula by formula, one token at a time, in Python floats."""
    total = 0.0
    log_probs, old, advantages, weights, owner = (x.tolist() for x in (log_probs, old, advantages, WEIGHTS, OWNER))
    for t, response in enumerate(owner):
        tokens = [u for u, other in enumerate(owner) if other == response]
        log_ratio = log_probs[t] - old[t]
        if kind.startswith("gspo"):
            log_ratio = sum(log_probs[u] - old[u] for u in tokens) / len(tokens)
        ratio, advantage = math.exp(log_ratio), advantages[t]
        clipped = min(max(ratio, 0.8), 1.3)
        if kind == "cispo":
            loss = -clipped * advantage * log_probs[t]
        else:
            loss = -min(ratio * advantage, clipped * advantage)
            if advantage < 0:
                loss = min(loss, -3.0 * advantage)
        total += weights[t] * loss
    return total


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "has_gradient", "bound"),
    [
        (1.2, 1.0, -1.2, True, None),
        (1.5, 1.0, -1.3, False, "clip_high"),
        (0.5, -1.0, 0.8, False, "clip_low"),
        (2.0, -1.0, 2.0, True, None),
        (5.0, -1.0, 3.0, False, "clip_dual"),
        (5.0, 0.0, 0.0, False, None),
    ],
)
def test_clipped_loss_equals_hand_computed_values(ratio, advantage, expected, has_gradient, bound):
    """Clip ratios 0.2 (low), 0.3 (high), 3 (dual)."""
    log_probs = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    result = policy_loss(log_probs, [-1.0], [advantage], [0], [1.0])
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0, abs=1e-5)
    assert [name for name in ("clip_high", "clip_low", "clip_dual") if result.sums[name]] == [bound] * bool(bound)
    assert result.sums["ratio"].item() == pytest.approx(ratio, rel=1e-6)
    assert result.sums["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_token_by_token_reference_and_gradient_equals_finite_differences(kind):
    log_probs, old, advantages = make_inputs()
    expected = reference_loss(log_probs, old, advantages, kind=kind)
    assert policy_loss(log_probs, old, advantages, kind=kind).loss.item() == pytest.approx(expected, abs=1e-12)
    if kind in ("default", "gspo"):  # the other two stop gradients on purpose
        assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, kind=kind).loss, (log_probs,))


def test_cispo_gives_every_token_its_clipped_ratio_as_gradient():
    log_probs = torch.tensor([-1 + math.log(5.0), -1 + math.log(0.1), -1.0], requires_grad=True)
    result = policy_loss(log_probs, [-1.0] * 3, [2.0, 2.0, -1.0], [0, 0, 1], [0.5] * 3, kind="cispo")
    result.loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5 * 1.3 * 2, -0.5 * 0.8 * 2, 0.5 * 1.0], abs=1e-6)


def test_gspo_token_has_the_value_and_for_even_advantages_the_gradient_of_gspo():
    log_probs, old, advantages = make_inputs()
    results = [policy_loss(log_probs, old, advantages, kind=kind) for kind in ("gspo", "gspo_token")]
    assert results[0].loss.item() == pytest.approx(results[1].loss.item(), abs=1e-12)
    gradients = [torch.autograd.grad(result.loss, log_probs)[0] for result in results]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)  # weights were rounded to float32


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_that_of_reinforce(kind):
    """At old == new every kind has the gradient -w A."""
    _, old, advantages = make_inputs()
    log_probs = old.clone().requires_grad_()
    policy_loss(log_probs, old, advantages, kind=kind).loss.backward()
    torch.testing.assert_close(log_probs.grad, -WEIGHTS * advantages, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_are_zeros_attached_to_the_graph_and_huge_ratios_stay_finite(kind):
    parameter, empty, owner = torch.randn(5, requires_grad=True), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for mode in ("token", "seq"):
        weights = compute_token_weights(owner, mode=mode, num_tokens=0, num_responses=0)
        weights = weights * compute_importance_weights(empty, empty, cap=2.0)
        result = policy_loss(parameter[:0], empty, empty, owner, weights, kind=kind)
        result.loss.backward()
        assert [result.loss.item(), *(value.item() for value in result.sums.values())] == [0.0] * 6
    assert parameter.grad.tolist() == [0.0] * 5
    log_probs = torch.tensor([-1.0, -200.0], requires_grad=True)
    result = policy_loss(log_probs, [-300.0, -1.0], [-1.0, 1.0], [0, 1], [1.0, 1.0], kind=kind)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    assert log_probs.grad.isfinite().all()
    assert result.sums["ratio"].item() == pytest.approx(math.exp(20) + math.exp(-20), rel=1e-5)


def test_truncated_importance_weights_are_ratios_up_to_the_cap():
    """Two policies are compared: the trainer's before the update and the one that the rollout engine drew from."""
    old = torch.tensor([-1.0, -1.0, -1.0, -2.0, -900.0], requires_grad=True)
    rollout = torch.tensor([-1.0 - math.log(0.5), -1.0 - math.log(3.0), -1.0, -500.0, 0.0])
    weights = compute_importance_weights(old, rollout, cap=2.0)
    assert weights.tolist() == pytest.approx([0.5, 2.0, 1.0, 2.0, math.exp(-20)])
    assert not weights.requires_grad


def test_token_weights_count_tokens_or_responses_of_the_whole_mini_batch():
    owner = torch.tensor([0, 0, 2])  # response 1 has no token
    by_token, by_response = (
        compute_token_weights(owner, mode=mode, num_tokens=30, num_responses=10) for mode in ("token", "seq")
    )
    assert by_token.tolist() == pytest.approx([1 / 30] * 3)
    assert by_response.tolist() == pytest.approx([0.05, 0.05, 0.1])
