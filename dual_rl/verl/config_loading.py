"""Reads the settings, a YAML file and `key=value` arguments that override it, and checks them.

    load_config(["config=examples/config.yaml", "data.train_files=train.csv", "worker.rollout.n=4"])

Paths are relative to the working directory and become absolute, so that processes on other nodes and in other folders
find the same files.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from verl.config import Config

CONFIG_ARGUMENT = "config"
CONFIG_FILE = "config.yaml"
USAGE = "usage: python3 -m verl.trainer.main config=examples/config.yaml data.train_files=train.csv key=value ..."
ADAPTER = TypeAdapter(Config)
REQUIRED = ("data.train_files", "worker.actor.model.model_path", "worker.reward.reward_function")
PATHS = (
    "data.train_files", "data.val_files", "data.image_dir", "data.format_prompt",
    "worker.actor.model.head_path", "trainer.load_checkpoint_path",
)  # fmt: skip
"""Settings that must be a file or folder where they are set."""

logger = logging.getLogger(__name__)


def load_config(argv: Sequence[str]) -> Config:
    """The settings that `argv` asks for: complete, checked, with absolute paths.

    `argv`: `config=FILE` and `key=value` in any order; later ones win, all of them over the file.
    Raises ValueError, naming key and remedy, for whatever cannot be used.
    """
    arguments = [_split(argument) for argument in argv]
    files = [_read_yaml(value) for key, value in arguments if key == CONFIG_ARGUMENT]
    overrides = [_read_override(key, value) for key, value in arguments if key != CONFIG_ARGUMENT]
    config = _build(OmegaConf.merge({}, *files, *overrides))
    if missing := [key for key in REQUIRED if not get_setting(config, key)]:
        raise ValueError(f"not set: {', '.join(missing)}. Give each as key=value.\n{USAGE}")
    _make_paths_absolute(config)
    if problems := _find_problems(config):
        raise ValueError("settings do not fit together:\n" + "\n".join(f"- {problem}" for problem in problems))
    if config.worker.rollout.top_p < 1.0 or config.worker.rollout.top_k != -1:
        logger.warning("top_p or top_k cuts the distribution that responses are drawn from; the update ignores that")
    return config


def save_config(config: Config, folder: Path) -> Path:
    """Write the complete settings into `folder` as YAML that `config=` reads again; returns the file."""
    path = Path(folder) / CONFIG_FILE
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(ADAPTER.dump_python(config, mode="json")))


def get_setting(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def leaf_types(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted key and declared type, e.g. ("worker.rollout.n", int)."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from leaf_types(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _split(argument: str) -> tuple[str, str]:
    key, separator, value = argument.partition("=")
    if not separator or not key or key.startswith("-"):
        raise ValueError(f"{argument} is not of the form key=value.\n{USAGE}")
    return key.strip(), value


def _read_yaml(file: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG_ARGUMENT}={file} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{file} is not a mapping of keys to values")
    return loaded


def _read_override(key: str, value: str) -> DictConfig:
    """One `key=value`. Strings are taken literally: `experiment_name=007` is not the number 7."""
    is_text = dict(leaf_types()).get(key) in (str, str | None) and value not in ("", "null", "~")
    try:
        return OmegaConf.from_dotlist([f"{key}={json.dumps(value, ensure_ascii=False) if is_text else value}"])
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value}: the value is not valid YAML: {error}") from error


def _build(values: DictConfig) -> Config:
    """Raises ValueError that lists every unknown key and every value of the wrong type or out of bounds."""
    try:
        return ADAPTER.validate_json(json.dumps(OmegaConf.to_container(values, resolve=True)))
    except ValidationError as errors:
        raise ValueError("\n".join(map(_describe, errors.errors()))) from errors
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _describe(error: dict[str, Any]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}. All keys are in verl/config.py."
    wrong = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key}={error['input']} {wrong}"


def _make_paths_absolute(config: Config) -> None:
    """Resolve paths against the working directory. Raises ValueError for a path that does not exist."""
    for key in PATHS:
        group, _, name = key.rpartition(".")
        setattr(get_setting(config, group), name, _existing(get_setting(config, key), key))
    model, reward = config.worker.actor.model, config.worker.reward
    if os.path.isdir(model.model_path):
        model.model_path = os.path.abspath(model.model_path)
    elif model.model_path.startswith((".", "/", "~")) or model.model_path.count("/") != 1:  # no name of a Hub model
        raise ValueError(f"worker.actor.model.model_path={model.model_path}: no such folder (from {Path.cwd()})")
    config.trainer.save_checkpoint_path = str(config.trainer.output_folder)
    path, separator, name = reward.reward_function.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"worker.reward.reward_function={reward.reward_function}: write it as path.py:function")
    reward.reward_function = f"{_existing(path, 'worker.reward.reward_function')}:{name}"


def _existing(path: str | None, key: str) -> str | None:
    if path is not None and not os.path.exists(path):
        raise ValueError(f"{key}={path}: no such file or folder (from {Path.cwd()})")
    return None if path is None else os.path.abspath(path)


def _find_problems(config: Config) -> list[str]:
    """Which settings do not go together, one sentence each with its remedy; empty when all is well."""
    data, algorithm, actor, ref = config.data, config.algorithm, config.worker.actor, config.worker.ref
    rollout, trainer, ranks = config.worker.rollout, config.trainer, config.trainer.num_ranks
    name = trainer.experiment_name
    rules = [
        (data.rollout_batch_size % actor.global_batch_size,
         f"data.rollout_batch_size={data.rollout_batch_size} is not a multiple of "
         f"worker.actor.global_batch_size={actor.global_batch_size} (both count pairs). Make it one."),
        (algorithm.kl_penalty == "full" and algorithm.has_kl_reward,
         "algorithm.kl_penalty=full compares whole distributions, which only the loss does. Set "
         "algorithm.use_kl_loss=true, or low_var_kl for KL in the reward."),
        (algorithm.online_filtering and algorithm.filter_low >= algorithm.filter_high,
         f"algorithm.filter_low={algorithm.filter_low} is not below algorithm.filter_high={algorithm.filter_high}, so "
         "that no pair passes. Lower the first."),
        (ranks > actor.global_batch_size * actor.ulysses_size,
         f"worker.actor.global_batch_size={actor.global_batch_size} pairs leave some of the {ranks} ranks without "
         "one. Raise it, or use fewer ranks."),
        (trainer.ranks_per_node % rollout.tensor_parallel_size,
         f"worker.rollout.tensor_parallel_size={rollout.tensor_parallel_size} does not divide the "
         f"{trainer.ranks_per_node} rank(s) of a node, and an engine does not span nodes. Choose a divisor."),
        (rollout.name == "hf" and rollout.tensor_parallel_size > 1,
         "worker.rollout.name=hf has no tensor parallelism. Set tensor_parallel_size=1 or name=vllm."),
        (rollout.is_quantized and (rollout.name == "hf" or trainer.n_gpus_per_node == 0),
         "worker.rollout.quantization and kv_cache_dtype need vllm on a GPU. Leave them out."),
        (actor.model.lora.rank and not actor.model.freeze_vision_tower,
         "worker.actor.model.lora.rank > 0 trains the language model only. Set "
         "worker.actor.model.freeze_vision_tower=true, or lora.rank=0 to tune the vision tower too."),
        (trainer.val_only and data.val_files is None,
         "trainer.val_only=true, but data.val_files is not set. Name the CSV to validate on."),
        (not name.strip() or name in (".", "..") or set(name) & set("/\\\0"),
         f"trainer.experiment_name={name!r} names a folder. Use no slashes and do not leave it empty."),
        (actor.fsdp.enable_cpu_offload and (actor.offload.offload_params or actor.offload.offload_optimizer),
         "worker.actor.fsdp.enable_cpu_offload=true keeps all in host memory. Leave out worker.actor.offload.*"),
        (ref.fsdp.enable_cpu_offload and ref.offload.offload_params,
         "worker.ref.fsdp.enable_cpu_offload=true keeps all in host memory. Leave out worker.ref.offload.*"),
    ]  # fmt: skip
    for key in ("worker.actor.fsdp.fsdp_size", "worker.ref.fsdp.fsdp_size", "worker.actor.ulysses_size"):
        size = get_setting(config, key)
        rules.append((size != -1 and ranks % size, f"{key}={size} does not divide the {ranks} rank(s) of the run."))
    return [message for is_wrong, message in rules if is_wrong]
