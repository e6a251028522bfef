"""What settings must be, each alone and together. Pure: looks at no file and at no machine."""

import logging
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from verl.trainer.config import Config, TrainerConfig

logger = logging.getLogger(__name__)

LOGGERS = ("console", "file", "tensorboard", "wandb")
SAMPLING_LIMITS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "n": (int, lambda value: value >= 1, "a whole number from 1"),
    "temperature": ((int, float), lambda value: 0.0 <= value < math.inf, "a number from 0"),
    "top_p": ((int, float), lambda value: 0.0 < value <= 1.0, "above 0, at most 1"),
    "top_k": (int, lambda value: value == -1 or value >= 1, "-1 (all tokens) or a whole number from 1"),
}
"""What `worker.rollout.val_override_config` may set: kind, condition, and the condition in words."""

_BOUNDS = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_RANGES: dict[str, str] = {
    "data.max_prompt_length": ">= 1",
    "data.max_response_length": ">= 1",
    "data.rollout_batch_size": ">= 1",
    "data.val_batch_size": ">= 1",
    "data.video_fps": "> 0",
    "data.min_pixels": ">= 1",
    "data.max_pixels": ">= 1",
    "data.seed": ">= 0",
    "algorithm.kl_coef": ">= 0",
    "algorithm.max_filter_rounds": ">= 1",
    "worker.actor.global_batch_size": ">= 1",
    "worker.actor.micro_batch_size_per_device_for_update": ">= 1",
    "worker.actor.micro_batch_size_per_device_for_experience": ">= 1",
    "worker.actor.max_grad_norm": "> 0",
    "worker.actor.clip_ratio_low": "> 0, <= 1",
    "worker.actor.clip_ratio_high": "> 0",
    "worker.actor.clip_ratio_dual": "> 1",
    "worker.actor.ppo_epochs": ">= 1",
    "worker.actor.bt_weight": ">= 0",
    "worker.actor.importance_sampling_cap": "> 0",
    "worker.actor.ulysses_size": ">= 1",
    "worker.actor.model.max_kept_layers": ">= 0",
    "worker.actor.model.lora.rank": ">= 0",
    "worker.actor.model.lora.alpha": ">= 1",
    "worker.actor.optim.lr": ">= 0",
    "worker.actor.optim.head_lr": ">= 0",
    "worker.actor.optim.betas.0": ">= 0, < 1",
    "worker.actor.optim.betas.1": ">= 0, < 1",
    "worker.actor.optim.weight_decay": ">= 0",
    "worker.actor.optim.lr_warmup_ratio": ">= 0, <= 1",
    "worker.actor.optim.min_lr_ratio": ">= 0, <= 1",
    "worker.rollout.temperature": "> 0",
    "worker.rollout.top_p": "> 0, <= 1",
    "worker.rollout.seed": ">= 0",
    "worker.rollout.gpu_memory_utilization": "> 0, < 1",
    "worker.rollout.tensor_parallel_size": ">= 1",
    "worker.rollout.max_num_batched_tokens": ">= 1",
    "worker.rollout.max_num_seqs": ">= 1",
    "worker.rollout.kv_cache_gib": ">= 1",
    "worker.rollout.log_prob_bound": "> 0",
    "trainer.total_epochs": ">= 1",
    "trainer.max_steps": ">= 1",
    "trainer.nnodes": ">= 1",
    "trainer.n_gpus_per_node": ">= 0",
    "trainer.n_cpu_ranks_per_node": ">= 1",
    "trainer.master_port": ">= 0, <= 65535",
    "trainer.val_generations_to_log": ">= 0",
}
"""Bounds of single numbers; None is always allowed where the type allows it."""
_MINUS_ONE_OR_POSITIVE = (
    "worker.actor.fsdp.fsdp_size",
    "worker.ref.fsdp.fsdp_size",
    "worker.rollout.top_k",
    "trainer.val_freq",
    "trainer.save_freq",
    "trainer.save_limit",
)


def ranks_per_node(trainer: TrainerConfig) -> int:
    """Training processes on each node: one per GPU, or the CPU ranks where there is none."""
    return trainer.n_gpus_per_node or trainer.n_cpu_ranks_per_node


def num_ranks(trainer: TrainerConfig) -> int:
    return trainer.nnodes * ranks_per_node(trainer)


def get_setting(config: Config, key: str) -> Any:
    """The value at a dotted key; a number picks from a tuple, e.g. worker.actor.optim.betas.0."""
    value: Any = config
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def find_problems(config: Config) -> list[str]:
    """Everything that is wrong with `config`, one sentence each with its remedy; empty when all is well."""
    problems = list(_check_ranges(config))
    if problems:  # what follows divides by these numbers
        return problems
    for check in (_check_batches, _check_ranks, _check_model, _check_sampling, _check_schedule, _check_names):
        problems.extend(check(config))
    return problems


def _check_ranges(config: Config) -> Iterator[str]:
    for key, bounds in _RANGES.items():
        value = get_setting(config, key)
        if value is not None and not _is_within(value, bounds):
            yield f"{key}={value}: must be {bounds}"
    for key in _MINUS_ONE_OR_POSITIVE:
        value = get_setting(config, key)
        if value != -1 and value < 1:
            yield f"{key}={value}: must be -1 or from 1 on"


def _is_within(value: float, bounds: str) -> bool:
    limits = (bound.split() for bound in bounds.split(", "))
    return math.isfinite(value) and all(_BOUNDS[sign](value, float(limit)) for sign, limit in limits)


def _check_batches(config: Config) -> Iterator[str]:
    data, actor, algorithm = config.data, config.worker.actor, config.algorithm
    if data.rollout_batch_size % actor.global_batch_size:
        yield (
            f"data.rollout_batch_size={data.rollout_batch_size} is no multiple of "
            f"worker.actor.global_batch_size={actor.global_batch_size} (both count pairs): make it one"
        )
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        yield f"data.min_pixels={data.min_pixels} is above data.max_pixels={data.max_pixels}: swap or change them"
    if algorithm.kl_penalty == "full" and not algorithm.use_kl_loss and not algorithm.disable_kl:
        yield (
            "algorithm.kl_penalty=full compares whole distributions, which only the loss does: set "
            "algorithm.use_kl_loss=true, or low_var_kl for KL in the reward"
        )
    if algorithm.online_filtering and algorithm.filter_low >= algorithm.filter_high:
        yield (
            f"algorithm.filter_low={algorithm.filter_low} is not below "
            f"algorithm.filter_high={algorithm.filter_high}: no pair could pass"
        )


def _check_ranks(config: Config) -> Iterator[str]:
    actor, rollout, trainer = config.worker.actor, config.worker.rollout, config.trainer
    per_node, total = ranks_per_node(trainer), num_ranks(trainer)
    if total > actor.global_batch_size * actor.ulysses_size:
        yield (
            f"worker.actor.global_batch_size={actor.global_batch_size} pairs leave some of the {total} ranks without "
            "one: raise it, or use fewer ranks"
        )
    for key, size in (
        ("worker.actor.fsdp.fsdp_size", actor.fsdp.fsdp_size),
        ("worker.ref.fsdp.fsdp_size", config.worker.ref.fsdp.fsdp_size),
        ("worker.actor.ulysses_size", actor.ulysses_size),
    ):
        if size != -1 and total % size:
            yield f"{key}={size} does not divide the {total} rank(s) of trainer.nnodes x trainer.n_gpus_per_node"
    if per_node % rollout.tensor_parallel_size:
        yield (
            f"worker.rollout.tensor_parallel_size={rollout.tensor_parallel_size} does not divide the {per_node} "
            "rank(s) of a node: an engine does not reach over nodes"
        )
    if rollout.name == "hf" and rollout.tensor_parallel_size > 1:
        yield "worker.rollout.name=hf has no tensor parallelism: set tensor_parallel_size=1 or name=vllm"


def _check_model(config: Config) -> Iterator[str]:
    actor, ref = config.worker.actor, config.worker.ref
    if actor.model.lora.rank and not actor.model.freeze_vision_tower:
        yield (
            "worker.actor.model.lora.rank > 0 trains the adapter of the language model only: set "
            "worker.actor.model.freeze_vision_tower=true, or lora.rank=0 to tune the vision tower too"
        )
    if ref.offload.offload_optimizer:
        yield "worker.ref.offload.offload_optimizer=true: the reference has no optimizer; leave it out"
    for name, part in (("actor", actor), ("ref", ref)):
        if part.fsdp.enable_cpu_offload and (part.offload.offload_params or part.offload.offload_optimizer):
            yield (
                f"worker.{name}.fsdp.enable_cpu_offload=true keeps everything in host memory already: leave out "
                f"worker.{name}.offload.*"
            )


def _check_sampling(config: Config) -> Iterator[str]:
    rollout = config.worker.rollout
    if rollout.n < 2:
        yield f"worker.rollout.n={rollout.n}: a group of one response has no advantage; take at least 2"
    if rollout.top_p < 1.0 or rollout.top_k != -1:
        logger.warning(
            "top_p or top_k cuts the distribution that responses are drawn from; the update does not see that"
        )
    for key, value in rollout.val_override_config.items():
        if key not in SAMPLING_LIMITS:
            yield f"worker.rollout.val_override_config.{key}: unknown; it may set {', '.join(SAMPLING_LIMITS)}"
            continue
        kind, is_allowed, words = SAMPLING_LIMITS[key]
        if isinstance(value, bool) or not isinstance(value, kind) or not is_allowed(value):
            yield f"worker.rollout.val_override_config.{key}={value}: must be {words}"


def _check_schedule(config: Config) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    if trainer.val_only and data.val_files is None:
        yield "trainer.val_only=true, but data.val_files is not set: name the CSV to validate on"
    if data.val_files and trainer.val_freq > 0 and trainer.save_freq > 0 and trainer.save_freq % trainer.val_freq:
        logger.warning(
            "trainer.save_freq=%d is no multiple of trainer.val_freq=%d: the best checkpoint is chosen only among "
            "those that were validated at their own step",
            trainer.save_freq,
            trainer.val_freq,
        )


def _check_names(config: Config) -> Iterator[str]:
    trainer = config.trainer
    if unknown := sorted(set(trainer.logger) - set(LOGGERS)):
        yield f"trainer.logger has {', '.join(unknown)}: choose from {', '.join(LOGGERS)}"
    name = trainer.experiment_name
    if not name.strip() or name in (".", "..") or any(character in name for character in "/\\\0"):
        yield f"trainer.experiment_name={name!r} names a folder: no slashes, not empty"
