"""The packed row and the objective on it: by hand, by identity, in any order and in parts."""

import math

import pytest
import torch

from model_support import make_builder, make_group, small_checkpoint
from verl.config import Config
from verl.core.objective import Experience, GlobalCounts, PolicyOutput, dual_loss
from verl.core.packing import PackedGroups, SharedPromptLayout, join_labels, pack_groups, split_labels
from verl.types import ResponseKey

LENGTHS = {0: ([2, 0], [1, -2]), 1: ([3, 1], [-1, 2])}
"""Of each pair's responses to A and B; a negative length is a response cut at the limit, -1 one without a label."""
PREFERENCES = {0: 1, 1: -1}
KEYS = [ResponseKey(pair, side, sample) for pair in LENGTHS for side in "AB" for sample in range(2)]
NUM_LABELS = dict(zip(KEYS, (3, 1, 2, 1, 4, 2, 0, 3), strict=True))
COUNTS = GlobalCounts(tokens=16, responses=7, pairs=4)
ADVANTAGES = {key: (index - 3.5) / 2 for index, key in enumerate(KEYS)}
REWARDS = {key: ((5 * index) % 7) / 4 for index, key in enumerate(KEYS)}


@pytest.fixture(scope="module")
def groups(small_model):
    """The groups of every pair, and the builder that packs them."""
    builder = make_builder(small_checkpoint(small_model))
    made = {
        pair: [make_group(builder, 2 * pair + index, lengths) for index, lengths in enumerate(sides)]
        for pair, sides in LENGTHS.items()
    }
    return made, builder


def values_of(offset: float) -> dict[ResponseKey, torch.Tensor]:
    """Made-up log-probs of every response."""
    return {
        key: torch.tensor([-1.0 - 0.01 * index - 0.1 * label - offset for label in range(NUM_LABELS[key])])
        for index, key in enumerate(KEYS)
    }


def make_config(**actor: object) -> Config:
    config = Config()
    config.algorithm.kl_coef, config.worker.actor.bt_weight = 0.5, 0.25
    for name, value in actor.items():
        setattr(config.worker.actor, name, value)
    return config


def run(packed: PackedGroups, config: Config, *, old: bool = False, **changed):
    """Loss, metrics, and the gradient by the log-prob of every response's first label and by every reward."""
    log_probs = join_labels(values_of(0.0), packed).requires_grad_()
    rewards = torch.tensor([REWARDS[key] for key in packed.keys], requires_grad=True)
    experience = Experience(
        **{
            "advantages": ADVANTAGES,
            "preferences": PREFERENCES,
            "rollout_log_probs": values_of(0.05),
            "old_log_probs": values_of(0.02) if old else None,
            "ref_log_probs": values_of(0.3),
            **changed,
        }
    )
    output = PolicyOutput(rewards, log_probs, torch.full_like(log_probs, 2.0).detach())
    loss, metrics = dual_loss(output, packed, experience, COUNTS, config)
    loss.backward()
    by_response = dict(zip(packed.keys, log_probs.grad.split(packed.num_labels), strict=True))
    return loss.item(), metrics, by_response, dict(zip(packed.keys, rewards.grad.tolist(), strict=True))


def pack(groups, order) -> PackedGroups:
    made, builder = groups
    return pack_groups([group for pair in order for group in made[pair]], builder)


@pytest.mark.parametrize("old", [False, True])
def test_loss_is_policy_loss_plus_kl_plus_bradley_terry_each_over_its_global_count(groups, old):
    loss, metrics, *_ = run(pack(groups, (0, 1)), make_config(), old=old)
    ratio = math.exp(0.02) if old else 1.0  # within the clip range
    policy = -sum(ratio * ADVANTAGES[key] * NUM_LABELS[key] for key in KEYS) / 16
    kl = math.exp(-0.3) + 0.3 - 1
    margins = [
        PREFERENCES[key.pair_id] * (REWARDS[key] - REWARDS[key._replace(side="B")]) for key in KEYS if key.side == "A"
    ]
    bt = sum(math.log1p(math.exp(-margin)) for margin in margins) / 4
    assert metrics["actor/policy_loss"].item() == pytest.approx(policy, abs=1e-6)
    assert metrics["actor/kl"].item() == pytest.approx(kl, abs=1e-6)
    assert metrics["bt/loss"].item() == pytest.approx(bt, abs=1e-6)
    assert loss == pytest.approx(policy + 0.5 * kl + 0.25 * bt, abs=1e-6)
    assert metrics["actor/loss"].item() == pytest.approx(loss)
    assert metrics["actor/entropy"].item() == pytest.approx(2.0)
    assert metrics["rollout/log_prob_difference_mean"].item() == pytest.approx(0.03 if old else 0.05, abs=1e-6)
    assert metrics["rollout/log_prob_difference_max"].item() == pytest.approx(0.03 if old else 0.05, abs=1e-6)
    assert metrics["rollout/log_prob_beyond_bound"].item() == 0.0
    assert not any(value.requires_grad for value in metrics.values())


def test_each_gradient_lands_on_the_response_that_the_value_belongs_to(groups):
    """In any order of the pairs in the row."""
    config = make_config()
    config.algorithm.disable_kl = True
    for order in ((0, 1), (1, 0)):
        *_, by_response, by_reward = run(pack(groups, order), config)
        for key in KEYS:
            assert by_response[key].tolist() == pytest.approx([-ADVANTAGES[key] / 16] * NUM_LABELS[key], abs=1e-7)
            partner = key._replace(side="B" if key.side == "A" else "A")
            sign = PREFERENCES[key.pair_id] * (1 if key.side == "A" else -1)
            expected = -0.25 / 4 * sign / (1 + math.exp(sign * (REWARDS[key] - REWARDS[partner])))
            assert by_reward[key] == pytest.approx(expected, abs=1e-7)


def test_losses_and_metrics_of_rows_add_up_to_those_of_one_row(groups):
    config = make_config(loss_avg_mode="seq")
    whole_loss, whole, *_ = run(pack(groups, (0, 1)), config, old=True)
    parts = [run(pack(groups, (pair,)), config, old=True) for pair in LENGTHS]
    assert sum(loss for loss, *_ in parts) == pytest.approx(whole_loss, abs=1e-6)
    for name in whole.keys() - {"rollout/log_prob_difference_max"}:
        assert sum(metrics[name].item() for _, metrics, *_ in parts) == pytest.approx(whole[name].item(), abs=1e-6)


def test_importance_weights_scale_the_policy_loss_but_not_the_kl(groups):
    _, plain, *_ = run(pack(groups, (0, 1)), make_config(), old=True)
    _, capped, *_ = run(pack(groups, (0, 1)), make_config(importance_sampling_cap=1.01), old=True)
    assert capped["actor/policy_loss"].item() == pytest.approx(1.01 * plain["actor/policy_loss"].item(), abs=1e-6)
    assert capped["actor/kl"].item() == plain["actor/kl"].item()


def test_kl_in_the_reward_is_no_part_of_the_loss(groups):
    config = make_config()
    config.algorithm.use_kl_loss = False
    loss, metrics, *_ = run(pack(groups, (0, 1)), config, ref_log_probs=None)
    assert "actor/kl" not in metrics
    assert loss == pytest.approx((metrics["actor/policy_loss"] + 0.25 * metrics["bt/loss"]).item(), abs=1e-7)


def test_labels_split_by_response_and_join_again(groups):
    packed, other_order = pack(groups, (0, 1)), pack(groups, (1, 0))
    assert packed.keys == tuple(KEYS)
    values = torch.randn(len(packed.labels))
    pieces = split_labels(values, packed)
    assert [len(pieces[key]) for key in packed.keys] == list(packed.num_labels)
    assert torch.equal(join_labels(pieces, packed), values)
    again = split_labels(join_labels(pieces, other_order), other_order)
    assert all(torch.equal(again[key], pieces[key]) for key in packed.keys)
    with pytest.raises(AssertionError, match="one value per label"):
        join_labels({**pieces, packed.keys[0]: values[:1]}, packed)


def test_layout_of_the_documented_example():
    layout = SharedPromptLayout((3,), ((2, 1),))
    assert layout.segment_bounds.tolist() == [0, 3, 5, 6]
    (group,) = layout.groups
    assert (group.prompt, group.responses) == (slice(0, 3), slice(3, 6))
    source, index = layout.unrolled
    assert source.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert index.tolist() == [0, 1, 2, 3, 4, 8]
