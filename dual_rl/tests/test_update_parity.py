"""The update as a whole, in fp32: against the slow path, and against itself cut up in any other way.

Bounds are relative, of each parameter's gradient. Every response has an advantage of its own, so that one that lands
on another response shows.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model_support import make_builder, small_checkpoint
from slow_path import compute_separately, load_policy
from training_support import forks, free_port
from update_support import (
    STEP,
    TEMPERATURE,
    Bench,
    Case,
    Outcome,
    Ranks,
    Tensors,
    largest_error,
    make_advantages,
    make_batch,
    make_config,
    shift_weights,
    trained,
    write_models,
)
from verl.core.objective import Experience, GlobalCounts, dual_loss
from verl.core.packing import pack_groups, split_labels
from verl.types import PairRollout, ResponseKey, VideoKey
from verl.workers.parallel import join_process_group

BOUND = 1e-5  # measured: up to 3.3e-6, after several steps; 1.6e-6 in the first
MICRO = "worker.actor.micro_batch_size_per_device_for_update"
KL = {"algorithm.disable_kl": False}
FULL_KL = {**KL, "algorithm.kl_penalty": "full"}
LORA = {"worker.actor.model.lora.rank": 4, "worker.actor.model.lora.alpha": 8}
TUNED = {"worker.actor.model.freeze_vision_tower": False}
CHECKPOINTING = {"worker.actor.model.enable_gradient_checkpointing": True}
SEQ_CAP = {"worker.actor.loss_avg_mode": "seq", "worker.actor.importance_sampling_cap": 1.5}
TUNED_SEQ_CAP = {**TUNED, **CHECKPOINTING, **SEQ_CAP}
SEVERAL_STEPS = {
    "worker.actor.global_batch_size": 2,
    "worker.actor.ppo_epochs": 2,
    "worker.actor.max_grad_norm": 0.5,
    "worker.actor.optim.lr": 1e-4,  # far enough for the ratio to be clipped, not for low_var_kl to be cut
}
CPU_OFFLOAD = {"worker.actor.fsdp.enable_cpu_offload": True, "worker.ref.fsdp.enable_cpu_offload": True}
HYBRID = {"worker.actor.fsdp.fsdp_size": 1}
ULYSSES = {"worker.actor.ulysses_size": 2}
SHUFFLED = (2, 0, 4, 1)
KINDS = ("dense", "experts")
BROKEN = Case(broken=ResponseKey(1, "B", 0))

CASES = {
    "uneven": (Case({**KL, MICRO: 1}), {}),
    "several_steps": (Case({**KL, **SEVERAL_STEPS, MICRO: 1}, order=SHUFFLED, has_old=True), {}),
    "lora": (Case({**KL, **LORA}), HYBRID),
    "rank_without_pairs": (Case({**KL, MICRO: 1}, order=(0,), has_old=True), {}),
    "ulysses": (Case({**KL, **LORA, MICRO: 2}, has_old=True), ULYSSES),
    "experts": (Case({**KL, MICRO: 1}, kind="experts"), {}),
    "tied": (Case(KL, kind="tied"), {}),
    "tied_lora": (Case({**KL, **LORA}, kind="tied"), HYBRID),
    "experts_ulysses": (Case({**KL, **LORA, **CHECKPOINTING}, kind="experts"), ULYSSES),
}
"""What two ranks must do as one does, and how they share the work."""
FOUR_RANKS = {
    "mini_batch_without_pairs": (Case({**KL, **SEVERAL_STEPS, MICRO: 1}, has_old=True), {}),
    "hybrid": (Case({**KL, MICRO: 1}, order=SHUFFLED), {"worker.actor.fsdp.fsdp_size": 2}),
    "ulysses_of_four": (Case({**KL, MICRO: 1}, order=SHUFFLED), {"worker.actor.ulysses_size": 4}),
    "two_groups": (Case({**KL, MICRO: 1}, order=SHUFFLED), {**ULYSSES, "worker.actor.fsdp.fsdp_size": 2}),
    "checkpointing": (Case({**LORA, **CHECKPOINTING}), ULYSSES),
}
"""Replicas of shards; rows cut in four, some without a label, with fewer key heads than ranks; groups of two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("update")


@pytest.fixture(scope="module")
def models(folder) -> dict[str, Path]:
    return write_models(folder / "models")


@pytest.fixture(scope="module")
def bench(models) -> Iterator[Bench]:
    """This process as the only rank."""
    forks()  # its server must not see the variables of this rank
    before = dict(os.environ)
    rank = join_process_group(index=0, world_size=1, address="127.0.0.1", port=free_port())
    yield Bench(models, rank)
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_rank(bench, folder) -> dict[str, Outcome]:
    """A step on one rank, whose state the two ranks load; dense, and with experts."""
    return {kind: bench.run(Case(KL, save=folder / f"of_one_{kind}", kind=kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def two_ranks(folder, models, one_rank) -> Iterator[Ranks]:
    cases = {name: case.change(sharing) for name, (case, sharing) in CASES.items()}
    cases["broken"] = BROKEN
    for kind in KINDS:
        of_one = Case(KL, load=folder / f"of_one_{kind}", kind=kind)
        cases |= {
            f"saved_{kind}": Case(KL, save=folder / f"of_two_{kind}", kind=kind),
            f"loaded_{kind}": of_one.change(num_updates=0),
            f"continued_{kind}": of_one,
        }
    ranks = Ranks(folder / "ranks", models, cases)
    yield ranks
    ranks.kill()


class SlowUpdate:
    """The update on one process without packing, sharding, caching or micro-batches.

    Its formulas are those of `dual_loss`, which test_objective.py compares with values worked out by hand.
    """

    def __init__(self, model: Path, case: Case) -> None:
        self.config = make_config(model, case.settings)
        checkpoint = small_checkpoint(model)
        self.builder = make_builder(checkpoint)
        self.model = load_policy(checkpoint, self.config.worker.actor.model)
        shift_weights(self.model)
        self.reference = load_policy(checkpoint, make_config(model, {}).worker.actor.model)
        self.rollouts, self.prompts = make_batch(case, self.builder)
        self.advantages = make_advantages(case)

    def gradient(
        self, rollouts: Sequence[PairRollout], old: Tensors | None = None
    ) -> tuple[dict[str, float], Tensors]:
        """Metrics and gradient of a mini-batch."""
        groups = self.groups_of(rollouts)
        packed = pack_groups(groups, self.builder)  # for the order of the responses
        reference = self.reference if self.config.algorithm.has_kl_loss else None
        output, ref = compute_separately(
            self.model, groups, self.builder, temperature=TEMPERATURE, reference=reference
        )
        known = Experience(
            advantages=self.advantages,
            preferences={rollout.pair.pair_id: rollout.pair.preference for rollout in rollouts},
            rollout_log_probs={response.key: response.log_probs for _, group in groups for response in group},
            old_log_probs=old,
            ref_log_probs=None if reference is None else split_labels(ref, packed),
        )
        num_pairs = 2 * sum(rollout.pair.preference in (1, -1) for rollout in rollouts)
        counts = GlobalCounts(sum(packed.num_labels), sum(map(bool, packed.num_labels)), num_pairs)
        loss, metrics = dual_loss(output, packed, known, counts, self.config)
        parameters = trained(self.model)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
        return {name: value.item() for name, value in metrics.items()}, gradient

    def groups_of(self, rollouts: Sequence[PairRollout]) -> list:
        sides = [(r.pair.pair_id, *side) for r in rollouts for side in (("A", r.responses_a), ("B", r.responses_b))]
        return [(self.prompts[VideoKey(pair_id, side)], responses) for pair_id, side, responses in sides]

    def run(self) -> list[Tensors]:
        """Clipped gradients of every optimizer step: `ppo_epochs` times all mini-batches, with AdamW in between."""
        actor, parameters = self.config.worker.actor, trained(self.model)
        optim = actor.optim
        groups = [
            {"params": [p for p in parameters.values() if (p.ndim > 1) == is_decayed], "weight_decay": decay}
            for is_decayed, decay in ((True, optim.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        whole = self.groups_of(self.rollouts)
        with torch.no_grad():
            output, _ = compute_separately(self.model, whole, self.builder, temperature=TEMPERATURE)
            old = split_labels(output.log_probs, pack_groups(whole, self.builder))
        gradients = []
        for start in [*range(0, len(self.rollouts), actor.global_batch_size)] * actor.ppo_epochs:
            _, found = self.gradient(self.rollouts[start : start + actor.global_batch_size], old)
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            torch.nn.utils.clip_grad_norm_(parameters.values(), actor.max_grad_norm)
            gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
            optimizer.step()
        return gradients


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


def change_error(found: Tensors, expected: Tensors, start: Tensors) -> float:
    """Distance of the weights, relative to how far the update moved them."""
    gap = sum((found[name] - expected[name]).square().sum() for name in start)
    moved = sum((start[name] - expected[name]).square().sum() for name in start)
    return (gap / moved).sqrt().item()


@pytest.fixture(scope="module", autouse=True)
def started(two_ranks) -> None:
    """The two ranks work while this process goes through the first tests."""


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({**KL, **LORA}, "dense"),
        (TUNED_SEQ_CAP, "dense"),
        (FULL_KL, "dense"),
        ({**KL, **LORA}, "experts"),
        (TUNED_SEQ_CAP, "experts"),
        (FULL_KL, "tied"),
    ],
    ids=["lora", "tuned_seq_cap", "full_kl", "experts_lora", "experts_tuned_seq_cap", "tied_full_kl"],
)
def test_update_equals_the_slow_path(bench, models, settings, kind):
    case = Case({**settings, MICRO: 2}, kind=kind)
    found, slow = bench.run(case), SlowUpdate(models[kind], case)
    metrics, gradient = slow.gradient(slow.rollouts)
    assert largest_error(found.gradients[0], gradient) < BOUND
    assert {name: found.metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_several_mini_batches_and_epochs_equal_the_slow_path(bench, models):
    """With clipped gradients, ratios that are clipped, a tie and a pair without a label."""
    case, _ = CASES["several_steps"]
    found, slow = bench.run(case), SlowUpdate(models["dense"], case)
    expected = slow.run()
    assert len(found.gradients) == len(expected) == 4
    for ours, theirs in zip(found.gradients, expected, strict=True):
        assert largest_error(ours, theirs) < BOUND
    assert found.metrics["actor/grad_norm"] > 0.5
    assert found.metrics["actor/clip_high"] + found.metrics["actor/clip_low"] > 0.05
    start = bench.run(case.change(num_updates=0)).weights
    weights = {name: parameter.detach() for name, parameter in trained(slow.model).items()}
    assert change_error(found.weights, weights, start) < 1e-2


def test_micro_batches_and_a_pass_for_old_log_probs_change_nothing(bench):
    expected = bench.run(Case(KL, order=(0, 1, 2, 3, 4)))
    experience = "worker.actor.micro_batch_size_per_device_for_experience"
    found = bench.run(Case({**KL, MICRO: 3, experience: 3}, order=(0, 1, 2, 3, 4), has_old=True))
    assert_same_update(found, expected)


def test_offloading_changes_nothing(bench):
    case = Case(KL, num_updates=2)
    expected = bench.run(case)
    found = bench.run(case.change(is_moved=True))
    assert_bit_equal(found.weights, expected.weights)
    assert_bit_equal(found.moments, expected.moments)
    assert_bit_equal(bench.run(case.change(CPU_OFFLOAD)).weights, expected.weights)


def assert_same_on_ranks(bench: Bench, ranks: Ranks, name: str, case: Case, *, last_rank: int = 1) -> None:
    """Gradients and metrics of the first and the last rank, and the weights."""
    expected = bench.run(case)
    for rank in (0, last_rank):
        found = ranks.outcome(name, rank)
        assert_same_update(found, expected)
    start = bench.run(case.change(num_updates=0)).weights
    assert change_error(found.weights, expected.weights, start) < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(bench, two_ranks, name):
    """`uneven` needs a filler; `ulysses` ranks share each row, the others have pairs of their own."""
    assert_same_on_ranks(bench, two_ranks, name, CASES[name][0])


def test_loss_that_is_not_finite_stops_every_rank_before_the_weights_change(bench, two_ranks):
    start = bench.run(Case(num_updates=0)).weights
    for outcome in (two_ranks.outcome("broken", 0), two_ranks.outcome("broken", 1), bench.run(BROKEN)):
        assert outcome.error.startswith(f"step {STEP}: loss nan")
        assert "worker.actor.optim.lr" in outcome.error
        assert_bit_equal(outcome.weights, start)
        assert outcome.moments == {}


def test_responses_of_another_policy_stop_the_run_before_the_weights_change(bench):
    outcome = bench.run(Case({"worker.rollout.max_log_prob_difference": 0.2}))
    assert "worker.rollout.max_log_prob_difference=0.2" in outcome.error
    assert_bit_equal(outcome.weights, bench.run(Case(num_updates=0)).weights)


@pytest.mark.parametrize("kind", KINDS)
def test_training_state_moves_between_one_and_two_ranks(bench, folder, one_rank, two_ranks, kind):
    saved, loaded = two_ranks.outcome(f"saved_{kind}"), two_ranks.outcome(f"loaded_{kind}")
    assert_bit_equal(loaded.weights, one_rank[kind].weights)
    assert_bit_equal(loaded.moments, one_rank[kind].moments)
    back = bench.run(Case(KL, load=folder / f"of_two_{kind}", num_updates=0, kind=kind))
    assert_bit_equal(back.weights, saved.weights)
    assert_bit_equal(back.moments, saved.moments)
    continued = bench.run(Case(KL, load=folder / f"of_one_{kind}", kind=kind))
    assert_same_update(two_ranks.outcome(f"continued_{kind}"), continued)


@pytest.mark.slow
def test_four_ranks_equal_one(bench, folder, models):
    cases = {name: case.change(sharing) for name, (case, sharing) in FOUR_RANKS.items()}
    ranks = Ranks(folder / "four", models, cases, world_size=4)
    try:
        for name, (case, _) in FOUR_RANKS.items():
            assert_same_on_ranks(bench, ranks, name, case, last_rank=3)
    finally:
        ranks.kill()


@pytest.mark.slow
def test_two_ranks_with_compiled_layers_equal_one_without(bench, folder, models, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # an engine of vLLM in this process sets it
    cases = {"full": Case({**KL, MICRO: 1}), "lora": Case({**KL, **LORA, **CHECKPOINTING})}
    cases |= {f"{name}_experts": case.change(kind="experts") for name, case in cases.items()}
    compiled = {name: case.change(is_compiled=True) for name, case in cases.items()}
    ranks = Ranks(folder / "compiled", models, compiled)
    try:
        for name, case in cases.items():
            assert_same_update(ranks.outcome(name), bench.run(case))
    finally:
        ranks.kill()
