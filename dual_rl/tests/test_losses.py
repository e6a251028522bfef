"""KL, Bradley-Terry and policy losses against hand-computed values, independent libraries and stage 1."""

import math
import random

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from losses import PairLabels
from losses import compute_pair_loss as stage1_pair_loss
from verl.config import ActorConfig
from verl.core.losses import (
    LossSums,
    compute_full_kl,
    compute_importance_weights,
    compute_kl,
    compute_pair_loss,
    compute_policy_loss,
    compute_token_weights,
)
from verl.types import ResponseKey

LOG2 = math.log(2.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [LOG2, -LOG2, 0.0]),
        ("abs", [LOG2, LOG2, 0.0]),
        ("mse", [LOG2**2 / 2, LOG2**2 / 2, 0.0]),
        ("low_var_kl", [0.5 - 1 + LOG2, 2 - 1 - LOG2, 0.0]),
    ],
)
def test_kl_estimates_equal_hand_computed_values_and_only_the_policy_gets_a_gradient(kind, expected):
    log_probs = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    reference = torch.tensor([-1.0 - LOG2, -1.0 + LOG2, -3.0], requires_grad=True)
    found = compute_kl(log_probs, reference, kind=kind)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    assert log_probs.grad.count_nonzero() >= 2
    assert reference.grad is None
    if kind == "low_var_kl":
        bounds = compute_kl(torch.linspace(-100, 100, 401), torch.zeros(401), kind=kind)
        assert (bounds.min().item(), bounds.max().item()) == (0.0, 10.0)


def test_full_kl_and_its_gradient_equal_torch_distributions_over_the_allowed_tokens():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 3, 7, dtype=torch.float64)
    policy.requires_grad_()
    is_allowed = torch.tensor([True, False, True, True, False, True, True])
    found = compute_full_kl(*(x.masked_fill(~is_allowed, -math.inf).log_softmax(-1) for x in (policy, reference)))
    expected = kl_divergence(*(Categorical(logits=x[:, is_allowed]) for x in (policy, reference)))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(kl.sum(), policy)[0] for kl in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][:, ~is_allowed] == 0).all()


# Differences A - B: 1.0 preferred, 0.5 against, tie, unlabelled, 0.0 preferred.
REWARDS_A = [1.5, 0.5, 3.0, 9.0, 2.0]
REWARDS_B = [0.5, 0.0, 0.0, -9.0, 2.0]
PREFERENCES = [1, -1, 0, None, 1]
KEYS = [ResponseKey(pair_id, side, 0) for side in "AB" for pair_id in range(5)]


def make_rewards() -> torch.Tensor:
    """Of KEYS."""
    return torch.tensor(REWARDS_A + REWARDS_B, requires_grad=True)


def pair_loss(rewards: torch.Tensor, order: list[int]) -> LossSums:
    return compute_pair_loss(rewards[order], [KEYS[index] for index in order], dict(enumerate(PREFERENCES)))


def test_bradley_terry_sums_and_gradient_equal_hand_computed_values_in_any_order():
    order = list(range(10))
    for _ in range(3):
        rewards = make_rewards()
        result = pair_loss(rewards, order)
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


def test_bradley_terry_is_that_of_stage_1():
    labels = PairLabels(
        preference=torch.tensor([[float(preference or 0)] for preference in PREFERENCES]),
        is_valid=torch.tensor([[preference is not None] for preference in PREFERENCES]),
        score_a=torch.full((5, 1), math.nan),
        score_b=torch.full((5, 1), math.nan),
    )
    expected = stage1_pair_loss(*make_rewards().unsqueeze(1).split(5), labels, loss_type="bt")
    assert pair_loss(make_rewards(), list(range(10))).loss.item() == expected.item()


@pytest.mark.parametrize("order", [[], [2, 3, 7, 8]], ids=["no pairs", "no decided pairs"])
def test_without_decided_pairs_the_loss_is_a_zero_attached_to_the_graph(order):
    rewards = make_rewards()
    result = pair_loss(rewards, order)
    result.loss.backward()
    assert (result.loss.item(), result.sums["chosen_reward"].item()) == (0.0, 0)
    assert rewards.grad.tolist() == [0.0] * 10


def test_incomplete_or_repeated_responses_are_refused():
    a, b = ResponseKey(0, "A", 0), ResponseKey(0, "B", 0)
    for keys in ([a], [b], [a, b._replace(sample=1)], [a, b._replace(pair_id=1)]):
        with pytest.raises(AssertionError, match="without their partner"):
            compute_pair_loss(torch.zeros(len(keys)), keys, {0: 1, 1: 1})
    with pytest.raises(AssertionError, match="occurs twice"):
        compute_pair_loss(torch.zeros(3), [a, b, a], {0: 1})


KINDS = ["default", "gspo", "gspo_token", "cispo"]
OWNER = torch.arange(4).repeat_interleave(torch.tensor([3, 1, 4, 2]))
WEIGHTS = compute_token_weights(OWNER, mode="seq", num_tokens=10, num_responses=4).double()


def policy_loss(log_probs, old, advantages, owner=OWNER, weights=WEIGHTS, *, kind="default") -> LossSums:
    old, advantages, owner, weights = map(torch.as_tensor, (old, advantages, owner, weights))
    settings = ActorConfig(loss_type=kind)
    return compute_policy_loss(
        log_probs, old_log_probs=old, advantages=advantages, owner=owner, weights=weights, settings=settings
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
def test_policy_loss_equals_token_by_token_reference_and_its_gradient_finite_differences(kind):
    log_probs, old, advantages = make_inputs()
    expected = reference_loss(log_probs, old, advantages, kind=kind)
    assert policy_loss(log_probs, old, advantages, kind=kind).loss.item() == pytest.approx(expected, abs=1e-12)
    if kind in ("default", "gspo"):  # the other two stop gradients on purpose
        assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, kind=kind).loss, (log_probs,))
    on_policy = old.clone().requires_grad_()
    policy_loss(on_policy, old, advantages, kind=kind).loss.backward()  # at old == new that of REINFORCE, -w A
    torch.testing.assert_close(on_policy.grad, -WEIGHTS * advantages, atol=1e-7, rtol=0)


def test_gradients_that_stop_on_purpose():
    """cispo gives every token its clipped ratio; gspo_token, for even advantages, the gradient of gspo."""
    log_probs = torch.tensor([-1 + math.log(5.0), -1 + math.log(0.1), -1.0], requires_grad=True)
    policy_loss(log_probs, [-1.0] * 3, [2.0, 2.0, -1.0], [0, 0, 1], [0.5] * 3, kind="cispo").loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5 * 1.3 * 2, -0.5 * 0.8 * 2, 0.5 * 1.0], abs=1e-6)
    log_probs, old, advantages = make_inputs()
    results = [policy_loss(log_probs, old, advantages, kind=kind) for kind in ("gspo", "gspo_token")]
    gradients = [torch.autograd.grad(result.loss, log_probs)[0] for result in results]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)  # weights were rounded to float32


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_are_zeros_attached_to_the_graph_and_huge_ratios_stay_finite(kind):
    parameter, empty, owner = torch.randn(5, requires_grad=True), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    weights = compute_token_weights(owner, mode="seq", num_tokens=0, num_responses=0)
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


def test_importance_weights_are_ratios_up_to_the_cap_and_token_weights_count_the_whole_mini_batch():
    """Two policies are compared: the trainer's before the update and the one that the rollout engine drew from."""
    old = torch.tensor([-1.0, -1.0, -1.0, -2.0, -900.0], requires_grad=True)
    rollout = torch.tensor([-1.0 - math.log(0.5), -1.0 - math.log(3.0), -1.0, -500.0, 0.0])
    weights = compute_importance_weights(old, rollout, cap=2.0)
    assert weights.tolist() == pytest.approx([0.5, 2.0, 1.0, 2.0, math.exp(-20)])
    assert not weights.requires_grad
    owner = torch.tensor([0, 0, 2])  # response 1 has no token
    for mode, expected in (("token", [1 / 30] * 3), ("seq", [0.05, 0.05, 0.1])):
        weights = compute_token_weights(owner, mode=mode, num_tokens=30, num_responses=10)
        assert weights.tolist() == pytest.approx(expected)
