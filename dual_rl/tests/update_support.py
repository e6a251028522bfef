"""What the tests of the update share: batches of pairs, and whole updates of them on any number of ranks.

An update runs through the real runtime, experience maker and learner.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from model_support import make_group, problem_of
from verl.config import Config
from verl.core.balancing import distribute_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.policy import PolicyModel
from verl.types import PairRollout, PreferencePair, Response, ResponseKey, VideoKey, VideoPrompt
from verl.workers.experience import ExperienceMaker
from verl.workers.learner import Learner
from verl.workers.model_setup import PolicyRuntime, build_runtime
from verl.workers.offload import WeightOffload, local_part
from verl.workers.parallel import Rank, gather_tensor
from verl.workers.rank_batch import RankBatch
from verl.workers.state import load_training_state, save_training_state

TEMPERATURE = 0.8
STEP = 7
LENGTHS = (([7, 3], [5, -4]), ([4, 0], [9, 6]), ([2, -1], [8, 3]), ([6, 12], [1, 5]), ([3, 4], [2, 2]))
"""Of each pair's responses to A and to B; negative lengths are cut ones, -1 has no label at all."""
PREFERENCES = (1, None, -1, 1, 0)
SETTINGS = {
    "algorithm.kl_coef": 0.5,
    "algorithm.disable_kl": True,
    "worker.rollout.temperature": TEMPERATURE,
    "worker.actor.bt_weight": 0.3,
    "worker.actor.max_grad_norm": 1e9,
    "worker.actor.global_batch_size": 5,
    "worker.actor.micro_batch_size_per_device_for_experience": 2,
    "worker.actor.model.enable_gradient_checkpointing": False,
    "worker.actor.optim.lr": 1e-3,
}
"""Losses of about one size, so that none of them hides in another's rounding."""

Tensors = dict[str, torch.Tensor]
Advantages = Mapping[ResponseKey, float]


@dataclass(frozen=True)
class Batch:
    """A step's pairs with their responses, and the prompts."""

    rollouts: tuple[PairRollout, ...]
    prompts: dict[VideoKey, VideoPrompt]

    @property
    def responses(self) -> list[Response]:
        return [response for rollout in self.rollouts for response in rollout.responses]

    def take(self, order: Sequence[int]) -> "Batch":
        return dataclasses.replace(self, rollouts=tuple(self.rollouts[index] for index in order))

    def with_preferences(self, preferences: Sequence[int | None]) -> "Batch":
        changed = [
            dataclasses.replace(rollout, pair=dataclasses.replace(rollout.pair, preference=preference))
            for rollout, preference in zip(self.rollouts, preferences, strict=True)
        ]
        return dataclasses.replace(self, rollouts=tuple(changed))


@dataclass(frozen=True)
class Case:
    """One update. `settings` by dotted key, over SETTINGS; `order` of the batch's pairs.

    `advantages`: by response, 0 for those left out; None for varied ones. `has_old`: compute old log-probs first.
    `load`, `save`: folders of training state to start from and to write. `is_moved`: parameters and moments are moved
    to host memory and back around the update, as the offload options do. `is_compiled`: layers are, as on GPUs; then
    only in a process of its own, which attends as compiled layers do from then on.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    order: tuple[int, ...] = (0, 1, 2)
    preferences: tuple[int | None, ...] = PREFERENCES
    advantages: Advantages | None = None
    has_old: bool = False
    load: Path | None = None
    save: Path | None = None
    num_updates: int = 1
    is_moved: bool = False
    is_compiled: bool = False


@dataclass(frozen=True)
class Outcome:
    """`gradients`: whole, of each optimizer step, after clipping. `weights`, `moments`: what is trained, afterwards.

    `error`: the message of a ValueError that ended the update.
    """

    metrics: dict[str, float]
    gradients: list[Tensors]
    weights: Tensors
    moments: Tensors
    error: str | None = None


def make_config(model: Path, settings: Mapping[str, object]) -> Config:
    config = Config()
    for key, value in {**SETTINGS, **settings, "worker.actor.model.model_path": str(model)}.items():
        *path, name = key.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        assert hasattr(part, name), key
        setattr(part, name, value)
    return config


def make_batch(builder: SequenceBuilder) -> Batch:
    """All pairs of LENGTHS; the rollout's log-probs are made up."""
    rollouts, prompts = [], {}
    generator = torch.Generator().manual_seed(0)
    for number, sides in enumerate(LENGTHS):
        pair = PreferencePair(number, ("a.mp4", "b.mp4"), problem_of(number), "", PREFERENCES[number])
        both = []
        for index, lengths in enumerate(sides):
            prompt, responses = make_group(builder, 2 * number + index, lengths)
            prompts[prompt.key] = prompt
            both.append(
                tuple(
                    dataclasses.replace(response, log_probs=-4 * torch.rand(response.num_labels, generator=generator))
                    for response in responses
                )
            )
        lengths = tuple(prompts[VideoKey(number, side)].input_ids.numel() for side in "AB")
        rollouts.append(PairRollout(pair, *both, prompt_tokens=lengths))
    return Batch(tuple(rollouts), prompts)


def batch_of(case: Case, builder: SequenceBuilder) -> Batch:
    return make_batch(builder).with_preferences(case.preferences).take(case.order)


def varied_advantages(batch: Batch) -> Advantages:
    """A different one for every response, of both signs."""
    keys = sorted(response.key for response in batch.responses)
    return {key: ((13 * place) % 17 - 7.5) / 5 for place, key in enumerate(keys)}


def advantages_of(case: Case, batch: Batch) -> Advantages:
    if case.advantages is None:
        return varied_advantages(batch)
    return {response.key: case.advantages.get(response.key, 0.0) for response in batch.responses}


@torch.no_grad()
def shift_weights(model: PolicyModel) -> None:
    """Move every trained weight but the vision tower's a little, by its name, so that the policy is not its reference.

    The head is made small: with rewards far apart Bradley-Terry would have no gradient.
    """
    model.rm_head.weight.mul_(0.05)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".visual." not in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            noise *= 0.1 if ".lora_B." in name else 0.01
            if isinstance(parameter, DTensor):
                parameter.to_local().add_(
                    distribute_tensor(noise, parameter.device_mesh, parameter.placements).to_local()
                )
            else:
                parameter.add_(noise)


def trained(model: PolicyModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor; a collective where it is sharded."""
    return gather_tensor(tensor).detach().clone()


class Bench:
    """Runs cases on this rank; what takes long to build is built once for all cases that need the same."""

    def __init__(self, model: Path, rank: Rank) -> None:
        self.model, self.rank = model, rank
        self._built: dict[str, tuple[PolicyRuntime, Tensors]] = {}

    def run(self, case: Case) -> Outcome:
        config = make_config(self.model, case.settings)
        runtime = self._runtime(config, case)
        if case.load is not None:
            load_training_state(case.load, runtime.actor, runtime.optimizer)
        gradients, metrics, error = [], {}, None

        def record(*_) -> None:
            found = trained(runtime.actor)
            gradients.append({name: whole(parameter.grad) for name, parameter in found.items()})

        with ExitStack() as stack:
            stack.callback(runtime.optimizer.register_step_pre_hook(record).remove)
            try:
                for _ in range(case.num_updates):
                    metrics = self._update(case, config, runtime)
            except ValueError as found:
                error = str(found)
                runtime.optimizer.zero_grad()
        if case.save is not None:
            save_training_state(case.save, runtime.actor, runtime.optimizer)
        weights = {name: whole(parameter) for name, parameter in trained(runtime.actor).items()}
        moments = {
            f"{name}.{moment}": whole(runtime.optimizer.state[parameter][moment])
            for name, parameter in trained(runtime.actor).items()
            for moment in ("exp_avg", "exp_avg_sq")
            if parameter in runtime.optimizer.state
        }
        return Outcome(metrics, gradients, weights, moments, error)

    def experience_of(self, case: Case, name: str) -> dict[ResponseKey, torch.Tensor]:
        """What `old_log_probs`, `ref_log_probs` or `rewards` of the ExperienceMaker gives."""
        config = make_config(self.model, case.settings)
        runtime = self._runtime(config, case)
        experience, batch = self._prepare(case, config, runtime)
        return {key: torch.as_tensor(value) for key, value in getattr(experience, name)(batch).items()}

    def _prepare(self, case: Case, config: Config, runtime: PolicyRuntime) -> tuple[ExperienceMaker, RankBatch]:
        actor = config.worker.actor
        step = batch_of(case, runtime.builder)
        mini_batches = distribute_pairs(
            step.rollouts,
            mini_batch_size=actor.global_batch_size,
            num_ranks=self.rank.world_size,
            ulysses_size=actor.ulysses_size,
        )
        batch = RankBatch(mini_batches[self.rank.index], step.rollouts[0], step.prompts)
        experience = ExperienceMaker(
            runtime,
            micro_batch_size=actor.micro_batch_size_per_device_for_experience,
            temperature=config.worker.rollout.temperature,
        )
        if actor.model.freeze_vision_tower:
            experience.encode_vision(batch)
        return experience, batch

    def _update(self, case: Case, config: Config, runtime: PolicyRuntime) -> dict[str, float]:
        experience, batch = self._prepare(case, config, runtime)
        if case.has_old:
            batch.old_log_probs = experience.old_log_probs(batch)
        if not config.algorithm.disable_kl and config.algorithm.kl_penalty != "full":
            batch.ref_log_probs = experience.ref_log_probs(batch)
        if case.is_moved:
            for model in filter(None, (runtime.actor, runtime.reference)):
                offload = WeightOffload(model.parameters())
                offload.release()
                assert all(local_part(p.detach()).untyped_storage().nbytes() == 0 for p in model.parameters())
                offload.restore()
        advantages = advantages_of(case, batch_of(case, runtime.builder))
        return Learner(runtime, experience, config).learn(batch, advantages, step=STEP, lr_factor=1.0)

    def _runtime(self, config: Config, case: Case) -> PolicyRuntime:
        """A runtime as it is at the start, with shifted weights."""
        actor, algorithm = config.worker.actor, config.algorithm
        settings = (actor.model, actor.fsdp, actor.optim, actor.ulysses_size, config.worker.ref, algorithm.disable_kl)
        key = repr((*settings, case.is_compiled))
        if key not in self._built:
            runtime = build_runtime(config, self.rank)
            shift_weights(runtime.actor)
            for model in filter(None, (runtime.actor, runtime.reference)) if case.is_compiled else ():
                model.compile_layers()
            self._built[key] = runtime, {name: _local(p).clone() for name, p in trained(runtime.actor).items()}
        runtime, start = self._built[key]
        with torch.no_grad():
            for name, parameter in trained(runtime.actor).items():
                _local(parameter).copy_(start[name])
        runtime.optimizer.state.clear()
        runtime.optimizer.zero_grad()
        return runtime


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor; absolute where nothing is expected."""
    norm = expected.norm().item()
    return (found - expected).norm().item() / (norm or 1.0)


def largest_error(found: Tensors, expected: Tensors) -> float:
    """Largest relative error of any tensor."""
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)
