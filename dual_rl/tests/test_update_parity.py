"""The update as a whole, in fp32: against the slow path by hand, and against itself cut up in any other way.

Bounds are relative, of each parameter's gradient; what is measured is said beside them.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model_support import write_small_model
from rank_script import Ranks
from slow_update import SlowUpdate
from training_support import free_port
from update_support import (
    LENGTHS,
    STEP,
    Bench,
    Case,
    Outcome,
    Tensors,
    largest_error,
    make_config,
    relative_error,
    trained,
)
from verl.types import ResponseKey
from verl.workers.model_setup import read_checkpoint
from verl.workers.parallel import join_process_group

BOUND = 1e-5  # measured: up to 3.3e-6, after several steps; 1.6e-6 in the first
CHECKPOINTING = "worker.actor.model.enable_gradient_checkpointing"
MICRO = "worker.actor.micro_batch_size_per_device_for_update"
KL = {"algorithm.disable_kl": False}
FULL_KL = {**KL, "algorithm.kl_penalty": "full"}
LORA = {"worker.actor.model.lora.rank": 4, "worker.actor.model.lora.alpha": 8}
TUNED = {"worker.actor.model.freeze_vision_tower": False}
SEVERAL_STEPS = {
    "worker.actor.global_batch_size": 2,
    "worker.actor.ppo_epochs": 2,
    "worker.actor.optim.lr": 1e-4,  # far enough for the ratio to be clipped, not for low_var_kl to be cut
}
ULYSSES = {"worker.actor.ulysses_size": 2}
SHUFFLED = (2, 0, 3, 1)
CASES = {
    "uneven": Case({**KL, MICRO: 1}),
    "even": Case({MICRO: 3, "worker.actor.max_grad_norm": 0.5}, order=SHUFFLED),
    "several_steps": Case({**KL, **SEVERAL_STEPS, MICRO: 1}, order=SHUFFLED, has_old=True),
    "lora": Case({**KL, **LORA}),
    "tuned": Case(TUNED),
    "full_kl": Case(FULL_KL),
    "rank_without_pairs": Case({**KL, MICRO: 1}, order=(0,), has_old=True),
    "mini_batch_without_pairs": Case({**KL, **SEVERAL_STEPS, MICRO: 1}, has_old=True),
    "ulysses": Case({MICRO: 2}),
    "ulysses_lora": Case({**KL, **LORA}),
}
"""What two ranks must do as one does."""
SHARDED_DIFFERENTLY = {
    "hsdp": {"worker.actor.fsdp.fsdp_size": 1},
    "cpu_offload": {"worker.actor.fsdp.enable_cpu_offload": True, "worker.ref.fsdp.enable_cpu_offload": True},
}
ALONE = [ResponseKey(0, "A", 1), ResponseKey(1, "B", 0), ResponseKey(2, "A", 0), ResponseKey(3, "B", 1)]


def alone_case(key: ResponseKey) -> Case:
    """Only this response has an advantage."""
    return Case({MICRO: 2}, order=SHUFFLED, preferences=(None,) * len(LENGTHS), advantages={key: 1.0})


def pair_case(pair_id: int, preference: int) -> Case:
    """Only this pair has a preference, and no response an advantage."""
    preferences = tuple(preference if number == pair_id else None for number in range(len(LENGTHS)))
    return Case({MICRO: 2}, order=SHUFFLED, preferences=preferences, advantages={})


PAIRS = {(3, 1), (3, -1), (0, -1)}
BROKEN = ResponseKey(1, "B", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("update")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return write_small_model(folder / "model")


@pytest.fixture(scope="module")
def bench(model) -> Iterator[Bench]:
    """This process as the only rank."""
    before = dict(os.environ)
    rank = join_process_group(index=0, world_size=1, address="127.0.0.1", port=free_port())
    yield Bench(model, rank)
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_rank(bench, folder) -> Outcome:
    """A step on one rank, whose state the two ranks load."""
    return bench.run(Case(KL, save=folder / "of_one"))


@pytest.fixture(scope="module", autouse=True)  # they work while this process goes through the first tests
def two_ranks(folder, model, one_rank) -> Iterator[Ranks]:
    cases = {
        name: dataclasses.replace(case, settings={**case.settings, **(ULYSSES if "ulysses" in name else {})})
        for name, case in CASES.items()
    }
    cases |= {name: Case({**KL, **settings}) for name, settings in SHARDED_DIFFERENTLY.items()}
    cases |= {f"alone_{number}": alone_case(key) for number, key in enumerate(ALONE)}
    cases |= {f"pair_{pair_id}_{preference}": pair_case(pair_id, preference) for pair_id, preference in PAIRS}
    cases |= {
        "broken": Case(advantages={BROKEN: float("nan")}),
        "saved": Case(KL, save=folder / "of_two"),
        "loaded": Case(KL, load=folder / "of_one", num_updates=0),
        "continued": Case(KL, load=folder / "of_one"),
    }
    jobs = {name: ("run", (case,)) for name, case in cases.items()}
    for name in ("rewards", "old_log_probs"):
        jobs[f"ulysses_{name}"] = ("experience_of", (cases["ulysses"], name))
    ranks = Ranks(folder / "ranks", model, jobs)
    yield ranks
    ranks.kill()


def assert_same_update(found: Outcome, expected: Outcome) -> None:
    """Gradients of every step and the metrics."""
    assert len(found.gradients) == len(expected.gradients) > 0
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert largest_error(ours, theirs) < BOUND
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)


def assert_bit_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def change_error(found: Outcome, expected: Outcome, start: Tensors) -> float:
    """Distance of the weights, relative to how far the update moved them."""
    gap = sum((found.weights[name] - expected.weights[name]).square().sum() for name in start)
    moved = sum((start[name] - expected.weights[name]).square().sum() for name in start)
    return (gap / moved).sqrt().item()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"worker.actor.loss_avg_mode": "seq"},
        {"worker.actor.importance_sampling_cap": 1.5},
        TUNED,
        KL,
        FULL_KL,
        {**KL, **LORA},
        {**FULL_KL, **LORA},
    ],
    ids=lambda settings: "-".join(f"{key.split('.')[-1]}={value}" for key, value in settings.items()) or "plain",
)
def test_update_equals_the_slow_path(bench, model, settings):
    """The other estimates of the KL differ in one formula, which test_kl.py holds against hand-computed values."""
    case = Case({**settings, MICRO: 2})
    found = bench.run(case)
    slow = SlowUpdate(model, case)
    loss, gradient = slow.gradient(slow.batch.rollouts)
    assert largest_error(found.gradients[0], gradient) < BOUND
    assert found.metrics["actor/loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["bt/loss"] == pytest.approx(slow.pair_loss(slow.batch.rollouts).item(), rel=1e-5)


def test_several_mini_batches_and_epochs_equal_the_slow_path(bench, model):
    case = CASES["several_steps"]
    found, slow = bench.run(case), SlowUpdate(model, case)
    expected = slow.run(has_old=True)
    assert len(found.gradients) == len(expected) == 4
    for ours, theirs in zip(found.gradients, expected, strict=True):
        assert largest_error(ours, theirs) < BOUND
    assert found.metrics["actor/clip_high"] + found.metrics["actor/clip_low"] > 0.05
    start = bench.run(dataclasses.replace(case, num_updates=0)).weights
    weights = {name: parameter.detach() for name, parameter in trained(slow.model).items()}
    assert change_error(found, dataclasses.replace(found, weights=weights), start) < 1e-2


@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_micro_batch_size_gives_the_same_update(bench, size):
    case = Case(KL, order=(0, 1, 2, 3, 4), has_old=True)
    expected, start = bench.run(case), bench.run(dataclasses.replace(case, num_updates=0)).weights
    experience = "worker.actor.micro_batch_size_per_device_for_experience"
    found = bench.run(dataclasses.replace(case, settings={**KL, MICRO: size, experience: size}))
    assert_same_update(found, expected)
    assert change_error(found, expected, start) < 1e-2


def test_policy_before_the_update_needs_no_pass_of_its_own(bench):
    shortcut, explicit = (bench.run(Case(KL, has_old=has_old)) for has_old in (False, True))
    assert_same_update(shortcut, explicit)


def test_lora_reference_equals_a_separate_reference_model(bench):
    found, expected = (bench.experience_of(Case({**KL, **settings}), "ref_log_probs") for settings in (LORA, {}))
    policy = bench.experience_of(Case({**KL, **LORA}), "old_log_probs")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    assert max((found[key] - policy[key]).abs().max() for key in found if len(found[key])) > 0.1


def test_cached_vision_features_give_the_update_of_recomputed_ones(bench):
    """With a tuned tower features are computed in every pass."""
    cached, recomputed = (bench.run(Case({**KL, **settings}, has_old=True)) for settings in ({}, TUNED))
    assert any(".visual." in name for name in recomputed.gradients[0].keys() - cached.gradients[0].keys())
    shared = {name: recomputed.gradients[0][name] for name in cached.gradients[0]}
    assert largest_error(cached.gradients[0], shared) < BOUND


def test_ties_and_missing_labels_leave_bradley_terry(bench):
    ties, missing = (bench.run(Case(preferences=(1, value, value, 0, 0))) for value in (0, None))
    assert_bit_equal(ties.gradients[0], missing.gradients[0])
    assert ties.metrics == missing.metrics
    alone = bench.run(Case(order=(0,), preferences=(1, None, None, None, None)))
    for name in ("bt/loss", "bt/accuracy", "bt/chosen_reward", "bt/rejected_reward"):
        assert ties.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-5)
    without = bench.run(Case(preferences=(0, None, 0, 0, 0)))
    assert without.metrics["bt/loss"] == 0
    assert without.gradients[0]["rm_head.weight"].count_nonzero() == 0
    assert without.metrics["actor/policy_loss"] == pytest.approx(ties.metrics["actor/policy_loss"], rel=1e-5)


def test_offloading_changes_nothing(bench):
    case = Case(KL, num_updates=2)
    expected = bench.run(case)
    found = bench.run(dataclasses.replace(case, is_moved=True))
    assert_bit_equal(found.weights, expected.weights)
    assert_bit_equal(found.moments, expected.moments)
    found = bench.run(dataclasses.replace(case, settings={**KL, **SHARDED_DIFFERENTLY["cpu_offload"]}))
    assert_bit_equal(found.weights, expected.weights)


def test_logged_learning_rate_is_the_models(bench):
    outcome = bench.run(Case({"worker.actor.optim.head_lr": 0.25}))
    assert outcome.metrics["actor/lr"] == 1e-3


def test_heads_that_cannot_be_shared_out_are_an_error(model):
    config = make_config(model, {"worker.actor.ulysses_size": 3})
    with pytest.raises(ValueError, match="does not divide the 4 attention heads"):
        read_checkpoint(config, with_weights=False)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(bench, two_ranks, name):
    """`uneven` needs a filler; `ulysses` ones share each row, the others have pairs of their own."""
    case = CASES[name]
    expected = bench.run(case)
    for rank in range(2):
        found = two_ranks.outcome(name, rank)
        assert_same_update(found, expected)
    start = bench.run(dataclasses.replace(case, num_updates=0)).weights
    assert change_error(found, expected, start) < 1e-2


@pytest.mark.parametrize("name", SHARDED_DIFFERENTLY)
def test_every_way_of_sharding_equals_one_rank(bench, two_ranks, name):
    assert_same_update(two_ranks.outcome(name), bench.run(Case(KL)))


@pytest.mark.parametrize("name", ["rewards", "old_log_probs"])
def test_ranks_that_share_rows_score_as_one_does(bench, two_ranks, name):
    expected = bench.experience_of(CASES["ulysses"], name)
    for rank in range(2):
        found = two_ranks.outcome(f"ulysses_{name}", rank)
        assert found.keys() == expected.keys()
        assert max(relative_error(found[key], expected[key]) for key in expected) < 1e-5


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_advantage_lands_on_the_tokens_of_its_response(model, two_ranks, number):
    """Shuffled, balanced over two ranks, packed: the gradient is that of the one response that has an advantage."""
    found = two_ranks.outcome(f"alone_{number}")
    slow = SlowUpdate(model, alone_case(ALONE[number]))
    (response,) = (response for response in slow.batch.responses if response.key == ALONE[number])
    num_tokens = sum(response.num_labels for response in slow.batch.responses)
    loss = -slow.distributions(slow.model, response)[1].sum() / num_tokens
    parameters = trained(slow.model)
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is None:
            assert found.gradients[0][name].count_nonzero() == 0
        else:
            assert relative_error(found.gradients[0][name], gradient) < BOUND


@pytest.mark.parametrize(("pair_id", "preference"), sorted(PAIRS))
def test_preference_lands_on_its_own_pair(model, two_ranks, pair_id, preference):
    found = two_ranks.outcome(f"pair_{pair_id}_{preference}")
    slow = SlowUpdate(model, pair_case(pair_id, preference))
    alone = [rollout for rollout in slow.batch.rollouts if rollout.pair.pair_id == pair_id]
    parameters = trained(slow.model)
    loss = 0.3 * slow.pair_loss(alone)
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            assert relative_error(found.gradients[0][name], gradient) < BOUND


def test_loss_that_is_not_finite_stops_every_rank_before_the_weights_change(bench, two_ranks):
    start = bench.run(Case(num_updates=0)).weights
    for outcome in (two_ranks.outcome("broken", 0), two_ranks.outcome("broken", 1)):
        assert outcome.error.startswith(f"step {STEP}: loss nan")
        assert "worker.actor.optim.lr" in outcome.error
        assert_bit_equal(outcome.weights, start)
    assert bench.run(Case(advantages={BROKEN: float("inf")})).error.startswith(f"step {STEP}")


def test_training_state_moves_between_one_and_two_ranks(bench, folder, one_rank, two_ranks):
    saved, loaded = two_ranks.outcome("saved"), two_ranks.outcome("loaded")
    assert_bit_equal(loaded.weights, one_rank.weights)
    assert_bit_equal(loaded.moments, one_rank.moments)
    back = bench.run(Case(KL, load=folder / "of_two", num_updates=0))
    assert_bit_equal(back.weights, saved.weights)
    assert_bit_equal(back.moments, saved.moments)
    assert_same_update(two_ranks.outcome("continued"), bench.run(Case(KL, load=folder / "of_one")))


def test_a_continued_run_may_have_another_learning_rate(bench, folder, one_rank):
    changed = {**KL, "worker.actor.optim.lr": 3e-4, "worker.actor.optim.head_lr": 2e-4}
    continued = bench.run(Case(changed, load=folder / "of_one"))
    assert continued.metrics["actor/lr"] == pytest.approx(3e-4)


FOUR_RANKS = {
    "hsdp": (KL, {"worker.actor.fsdp.fsdp_size": 2}),
    "ulysses_of_four": (KL, {"worker.actor.ulysses_size": 4}),
    "two_groups": (KL, {**ULYSSES, "worker.actor.fsdp.fsdp_size": 2}),
    "tuned": (TUNED, ULYSSES),
    "full_kl": (FULL_KL, ULYSSES),
    "checkpointing": ({**KL, **LORA, "worker.actor.model.enable_gradient_checkpointing": True}, ULYSSES),
}
"""What is learned, and how four ranks share the work."""


@pytest.mark.slow
def test_four_ranks_equal_one(bench, folder, model):
    """Replicas of shards; rows cut in four, some without a label, with fewer key heads than ranks; groups of two."""
    cases = {
        name: Case({**settings, **sharing, MICRO: 1}, order=SHUFFLED)
        for name, (settings, sharing) in FOUR_RANKS.items()
    }
    ranks = Ranks(folder / "four", model, {name: ("run", (case,)) for name, case in cases.items()}, world_size=4)
    try:
        for name, (settings, _) in FOUR_RANKS.items():
            expected = bench.run(Case({**settings, MICRO: 1}, order=SHUFFLED))
            assert_same_update(ranks.outcome(name, 3), expected)
    finally:
        ranks.kill()


@pytest.mark.slow
def test_two_ranks_with_compiled_layers_equal_one_without(bench, model, tmp_path_factory, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # an engine of vLLM in this process sets it
    cases = {"full": Case({**KL, MICRO: 1}), "lora": Case({**KL, **LORA, CHECKPOINTING: True})}
    compiled = {name: ("run", (dataclasses.replace(case, is_compiled=True),)) for name, case in cases.items()}
    ranks = Ranks(tmp_path_factory.mktemp("compiled") / "two", model, compiled)
    try:
        for name, case in cases.items():
            assert_same_update(ranks.outcome(name), bench.run(case))
    finally:
        ranks.kill()
