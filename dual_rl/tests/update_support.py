"""Whole updates through the real runtime, experience maker and learner: on this process, or on ranks of their own."""

import dataclasses
import multiprocessing
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from model_support import make_group, problem_of, write_small_model
from training_support import forks, free_port
from verl.config import Config
from verl.core.balancing import distribute_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.policy import PolicyModel
from verl.types import PairRollout, PreferencePair, ResponseKey, VideoKey, VideoPrompt
from verl.workers.experience import ExperienceMaker, RankBatch
from verl.workers.learner import Learner
from verl.workers.model_setup import PolicyRuntime, build_runtime, read_checkpoint
from verl.workers.offload import WeightOffload, local_part
from verl.workers.parallel import Rank, gather_tensor, join_process_group
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
    "worker.rollout.max_log_prob_difference": 99.0,  # the rollout's are made up
    "worker.actor.bt_weight": 0.3,
    "worker.actor.max_grad_norm": 1e9,
    "worker.actor.global_batch_size": 5,
    "worker.actor.micro_batch_size_per_device_for_experience": 2,
    "worker.actor.model.enable_gradient_checkpointing": False,
    "worker.actor.optim.lr": 1e-3,
}
"""Losses of about one size, so that none of them hides in another's rounding."""
TIMEOUT_SECONDS = 400

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One update. `settings` by dotted key, over SETTINGS; `order`: indices into LENGTHS, the pairs of the batch.

    `broken`: a response whose advantage is not a number. `has_old`: compute old log-probs first. `load`, `save`:
    folders of training state. `kind`: of the model, see write_models. `is_moved`: weights go to host memory and back,
    as the offload options do.
    `is_compiled`: layers are compiled, as on GPUs; only on ranks of their own, whose process attends so from then on.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    order: tuple[int, ...] = (0, 1, 2)
    broken: ResponseKey | None = None
    has_old: bool = False
    load: Path | None = None
    save: Path | None = None
    num_updates: int = 1
    kind: str = "dense"
    is_moved: bool = False
    is_compiled: bool = False

    def change(self, settings: Mapping[str, object] = (), **changes: object) -> "Case":
        return dataclasses.replace(self, settings={**self.settings, **dict(settings)}, **changes)


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


def make_batch(case: Case, builder: SequenceBuilder) -> tuple[list[PairRollout], dict[VideoKey, VideoPrompt]]:
    """The case's pairs and the prompts; the rollout's log-probs are made up."""
    rollouts, prompts = [], {}
    for number in case.order:
        generator = torch.Generator().manual_seed(number)
        both = []
        for index, lengths in enumerate(LENGTHS[number]):
            prompt, responses = make_group(builder, 2 * number + index, lengths)
            prompts[prompt.key] = prompt
            drawn = [-4 * torch.rand(response.num_labels, generator=generator) for response in responses]
            both.append(
                tuple(dataclasses.replace(r, log_probs=values) for r, values in zip(responses, drawn, strict=True))
            )
        pair = PreferencePair(number, ("a.mp4", "b.mp4"), problem_of(number), "", PREFERENCES[number])
        tokens = tuple(prompts[VideoKey(number, side)].input_ids.numel() for side in "AB")
        rollouts.append(PairRollout(pair, *both, prompt_tokens=tokens))
    return rollouts, prompts


def make_advantages(case: Case) -> dict[ResponseKey, float]:
    """A different one for every response, of both signs."""
    keys = [ResponseKey(number, side, sample) for number in range(5) for side in "AB" for sample in range(2)]
    advantages = {key: ((13 * index) % 17 - 7.5) / 5 for index, key in enumerate(keys)}
    return advantages if case.broken is None else {**advantages, case.broken: float("nan")}


@torch.no_grad()
def shift_weights(model: PolicyModel) -> None:
    """Move every trained weight but the vision tower's a little, by its name, so that the policy is not its reference.

    The head is made small: with rewards far apart Bradley-Terry would have no gradient.
    """
    model.rm_head.weight.mul_(0.05)
    for name, parameter in trained(model).items():
        if ".visual." not in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            noise *= 0.1 if ".lora_B." in name else 0.01
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            local_part(parameter.detach()).add_(local_part(noise))


def trained(model: PolicyModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_models(folder: Path) -> dict[str, Path]:
    """Small models by kind."""
    kinds = {"dense": {}, "experts": {"has_experts": True}, "tied": {"tied": True}}
    return {kind: write_small_model(folder / kind, **settings) for kind, settings in kinds.items()}


class Bench:
    """Runs cases on this rank; runtimes are shared by all cases that need the same. `models`: by kind."""

    def __init__(self, models: Mapping[str, Path], rank: Rank) -> None:
        self.models, self.rank = models, rank
        self._built: dict[str, tuple[PolicyRuntime, Tensors]] = {}

    def run(self, case: Case) -> Outcome:
        config = make_config(self.models[case.kind], case.settings)
        runtime = self._runtime(config, case)
        parameters = trained(runtime.actor)
        if case.load is not None:
            load_training_state(case.load, runtime.actor, runtime.optimizer)
        gradients, metrics, error = [], {}, None

        def record(*_) -> None:
            gradients.append({name: gather_tensor(p.grad).clone() for name, p in parameters.items()})

        hook = runtime.optimizer.register_step_pre_hook(record)
        try:
            for _ in range(case.num_updates):
                metrics = self._update(case, config, runtime)
        except ValueError as found:
            error = str(found)
            runtime.optimizer.zero_grad()
        finally:
            hook.remove()
        if case.save is not None:
            save_training_state(case.save, runtime.actor, runtime.optimizer)
        weights = {name: gather_tensor(parameter).clone() for name, parameter in parameters.items()}
        state = runtime.optimizer.state
        moments = {
            f"{name}.{moment}": gather_tensor(state[parameter][moment]).clone()
            for name, parameter in parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
            if parameter in state
        }
        return Outcome(metrics, gradients, weights, moments, error)

    def _update(self, case: Case, config: Config, runtime: PolicyRuntime) -> dict[str, float]:
        actor = config.worker.actor
        rollouts, prompts = make_batch(case, runtime.builder)
        mini_batches = distribute_pairs(
            rollouts,
            mini_batch_size=actor.global_batch_size,
            num_ranks=self.rank.world_size,
            ulysses_size=actor.ulysses_size,
        )
        batch = RankBatch(mini_batches[self.rank.index], rollouts[0], prompts)
        micro_batch_size = actor.micro_batch_size_per_device_for_experience
        experience = ExperienceMaker(runtime, micro_batch_size=micro_batch_size, temperature=TEMPERATURE)
        if actor.model.freeze_vision_tower:
            experience.encode_vision(batch)
        if case.has_old:
            batch.old_log_probs = experience.old_log_probs(batch)
        if not config.algorithm.disable_kl and config.algorithm.kl_penalty != "full":
            batch.ref_log_probs = experience.ref_log_probs(batch)
        for model in filter(None, (runtime.actor, runtime.reference)) if case.is_moved else ():
            offload = WeightOffload(model.parameters())
            offload.release()
            assert all(local_part(p.detach()).untyped_storage().nbytes() == 0 for p in model.parameters())
            offload.restore()
        return Learner(runtime, experience, config).learn(batch, make_advantages(case), step=STEP, lr_factor=1.0)

    def _runtime(self, config: Config, case: Case) -> PolicyRuntime:
        """A runtime as it is at the start, with shifted weights."""
        actor = config.worker.actor
        settings = (actor.model, actor.fsdp, actor.optim, actor.ulysses_size, config.worker.ref)
        key = repr((*settings, config.algorithm.disable_kl, case.is_compiled))
        if key not in self._built:
            runtime = build_runtime(read_checkpoint(config, with_weights=self.rank.index == 0), config, self.rank)
            shift_weights(runtime.actor)
            for model in filter(None, (runtime.actor, runtime.reference)) if case.is_compiled else ():
                model.compile_layers()
            start = {name: local_part(p.detach()).clone() for name, p in trained(runtime.actor).items()}
            self._built[key] = runtime, start
        runtime, start = self._built[key]
        for name, parameter in trained(runtime.actor).items():
            local_part(parameter.detach()).copy_(start[name])
        runtime.optimizer.state.clear()
        runtime.optimizer.zero_grad()
        return runtime


class Ranks:
    """Processes that run cases beside the tests; `outcome` waits for one case of one rank."""

    def __init__(
        self, folder: Path, models: Mapping[str, Path], cases: Mapping[str, Case], *, world_size: int = 2
    ) -> None:
        folder.mkdir()
        self.folder, port = folder, free_port()
        # A fork starts at once; compiling has to see this process's variables.
        is_compiled = any(case.is_compiled for case in cases.values())
        context = multiprocessing.get_context("spawn") if is_compiled else forks()
        self.processes = [
            context.Process(target=_run_cases, args=(folder, models, dict(cases), rank, world_size, port), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def outcome(self, name: str, rank: int = 0) -> Outcome:
        for process in self.processes:
            process.join(TIMEOUT_SECONDS)
            assert process.exitcode == 0, "a rank failed, see its output"
        return torch.load(self.folder / f"{name}_{rank}.pt", weights_only=False)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _run_cases(
    folder: Path, models: Mapping[str, Path], cases: Mapping[str, Case], index: int, world_size: int, port: int
) -> None:
    bench = Bench(models, join_process_group(index=index, world_size=world_size, address="127.0.0.1", port=port))
    for name, case in cases.items():
        torch.save(bench.run(case), folder / f"{name}_{index}.pt")
    dist.destroy_process_group()  # gloo's threads must not outlive it


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor; absolute where nothing is expected."""
    return (found - expected).norm().item() / (expected.norm().item() or 1.0)


def largest_error(found: Tensors, expected: Tensors) -> float:
    """Largest relative error of any tensor."""
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)
