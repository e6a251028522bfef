"""Policy losses against hand-computed values, a token-by-token reference, and what they promise about splitting."""

import math

import pytest
import torch

from verl.config import ActorConfig
from verl.core.policy_loss import (
    PolicyLoss,
    compute_importance_weights,
    compute_policy_loss,
    compute_token_weights,
)

KINDS = ["default", "gspo", "gspo_token", "cispo"]
LENGTHS = torch.tensor([3, 1, 4, 2])


def policy_loss(log_probs, old, advantages, **others) -> PolicyLoss:
    return compute_policy_loss(log_probs, old_log_probs=old, advantages=advantages, **others)


def make_inputs(*, seed=0, dtype=torch.float64, spread=0.5):
    """Log-probs, old log-probs, advantages per token and owners of four responses."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    old = -torch.rand(len(owner), generator=generator, dtype=dtype) * 3
    log_probs = (old + torch.randn(len(owner), generator=generator, dtype=dtype) * spread).requires_grad_()
    advantages = torch.tensor([1.5, -0.5, -2.0, 0.0], dtype=dtype)[owner]
    return log_probs, old, advantages, owner


def reference_loss(log_probs, old, advantages, owner, weights, *, kind):
    """Formula by formula, one token at a time, in Python floats."""
    total = 0.0
    log_probs, old, advantages, weights = (x.tolist() for x in (log_probs, old, advantages, weights))
    owner = owner.tolist()
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


# ratio, advantage -> loss, does the ratio have a gradient, which bound took hold (low 0.2, high 0.3, dual 3)
CASES = [
    (1.0, 2.0, -2.0, True, None),
    (1.2, 1.0, -1.2, True, None),
    (1.5, 1.0, -1.3, False, "clip_high"),
    (0.5, 1.0, -0.5, True, None),
    (0.5, -1.0, 0.8, False, "clip_low"),
    (2.0, -1.0, 2.0, True, None),
    (5.0, -1.0, 3.0, False, "clip_dual"),
    (5.0, 0.0, 0.0, False, None),
]


@pytest.mark.parametrize(("ratio", "advantage", "expected", "has_gradient", "bound"), CASES)
def test_clipped_loss_equals_hand_computed_values(ratio, advantage, expected, has_gradient, bound):
    log_probs = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    result = policy_loss(
        log_probs,
        torch.tensor([-1.0]),
        torch.tensor([advantage]),
        owner=torch.tensor([0]),
        weights=torch.tensor([1.0]),
        settings=ActorConfig(),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0, abs=1e-5)
    for name in ("clip_high", "clip_low", "clip_dual"):
        assert result.sums[name].item() == float(name == bound)
    assert result.sums["ratio"].item() == pytest.approx(ratio, rel=1e-6)
    assert result.sums["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_token_by_token_reference_and_gradient_equals_finite_differences(kind, mode):
    log_probs, old, advantages, owner = make_inputs()
    weights = compute_token_weights(owner, mode=mode, num_tokens=10, num_responses=4).double()
    settings = ActorConfig(loss_type=kind)

    def loss_of(values):
        return policy_loss(values, old, advantages, owner=owner, weights=weights, settings=settings).loss

    assert loss_of(log_probs).item() == pytest.approx(
        reference_loss(log_probs, old, advantages, owner, weights, kind=kind), abs=1e-12
    )
    if kind in ("default", "gspo"):  # the other two stop gradients on purpose
        assert torch.autograd.gradcheck(loss_of, (log_probs,))


def test_cispo_gives_every_token_its_clipped_ratio_as_gradient():
    log_probs = torch.tensor([-1 + math.log(5.0), -1 + math.log(0.1), -1.0], requires_grad=True)
    result = policy_loss(
        log_probs,
        torch.full((3,), -1.0),
        torch.tensor([2.0, 2.0, -1.0]),
        owner=torch.tensor([0, 0, 1]),
        weights=torch.full((3,), 0.5),
        settings=ActorConfig(loss_type="cispo"),
    )
    result.loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5 * 1.3 * 2, -0.5 * 0.8 * 2, 0.5 * 1.0], abs=1e-6)
    assert [result.sums[name].item() for name in ("clip_high", "clip_low", "clip_dual")] == [1, 1, 0]


def test_gspo_token_has_the_value_and_for_even_advantages_the_gradient_of_gspo():
    gradients, losses = [], []
    for kind in ("gspo", "gspo_token"):
        log_probs, old, advantages, owner = make_inputs(seed=3)
        weights = compute_token_weights(owner, mode="seq", num_tokens=10, num_responses=4).double()
        result = policy_loss(
            log_probs, old, advantages, owner=owner, weights=weights, settings=ActorConfig(loss_type=kind)
        )
        losses.append(result.loss.item())
        gradients.append(torch.autograd.grad(result.loss, log_probs)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=0)  # weights were rounded to float32


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_that_of_reinforce(kind):
    """At old == new every kind has the gradient -w A, each response's shared evenly by its tokens."""
    _, old, advantages, owner = make_inputs()
    weights = compute_token_weights(owner, mode="seq", num_tokens=10, num_responses=4).double()
    log_probs = old.clone().requires_grad_()
    result = policy_loss(
        log_probs, old, advantages, owner=owner, weights=weights, settings=ActorConfig(loss_type=kind)
    )
    result.loss.backward()
    torch.testing.assert_close(log_probs.grad, -weights * advantages, atol=1e-7, rtol=0)
    assert result.sums["ratio"].item() == pytest.approx(10.0)
    assert result.sums["approx_kl"].item() == 0.0


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics_are_sums_over_any_split_of_the_responses(kind, mode):
    log_probs, old, advantages, owner = make_inputs(seed=1)
    settings = ActorConfig(loss_type=kind)

    def run(responses):
        """Loss, gradient on the whole row, and metrics of some of the responses, renumbered from 0."""
        rows = torch.cat([torch.nonzero(owner == response).flatten() for response in responses])
        local_owner = torch.arange(len(responses)).repeat_interleave(LENGTHS[responses])
        result = policy_loss(
            log_probs[rows],
            old[rows],
            advantages[rows],
            owner=local_owner,
            weights=compute_token_weights(local_owner, mode=mode, num_tokens=10, num_responses=4).double(),
            settings=settings,
        )
        return torch.autograd.grad(result.loss, log_probs)[0], torch.stack([result.loss, *result.sums.values()])

    whole_gradient, whole_values = run([0, 1, 2, 3])
    parts = [run([3]), run([1, 0]), run([2])]
    torch.testing.assert_close(sum(gradient for gradient, _ in parts), whole_gradient)
    torch.testing.assert_close(sum(values for _, values in parts), whole_values)


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_that_is_attached_to_the_graph(kind, mode):
    parameter = torch.randn(5, requires_grad=True)
    empty, owner = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    weights = compute_token_weights(owner, mode=mode, num_tokens=0, num_responses=0)
    weights = weights * compute_importance_weights(empty, empty, cap=2.0)
    result = policy_loss(
        parameter[:0],
        empty,
        empty,
        owner=owner,
        weights=weights,
        settings=ActorConfig(loss_type=kind),
    )
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert parameter.grad.tolist() == [0.0] * 5
    assert all(value.item() == 0.0 for value in result.sums.values())


@pytest.mark.parametrize("kind", KINDS)
def test_huge_log_ratios_stay_finite(kind):
    log_probs = torch.tensor([-1.0, -200.0], requires_grad=True)
    result = policy_loss(
        log_probs,
        torch.tensor([-300.0, -1.0]),
        torch.tensor([-1.0, 1.0]),
        owner=torch.tensor([0, 1]),
        weights=torch.ones(2),
        settings=ActorConfig(loss_type=kind),
    )
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
    by_token = compute_token_weights(owner, mode="token", num_tokens=30, num_responses=10)
    by_response = compute_token_weights(owner, mode="seq", num_tokens=30, num_responses=10)
    assert by_token.tolist() == pytest.approx([1 / 30] * 3)
    assert by_response.tolist() == pytest.approx([0.05, 0.05, 0.1])
