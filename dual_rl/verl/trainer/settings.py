"""Reads the settings: a YAML file, then `key=value` arguments over it, checked before anything is started.

    load_config(["config=examples/config.yaml", "data.train_files=train.csv", "worker.rollout.n=4"])

Paths are relative to where the program is called from and leave here absolute, so that processes on other nodes and in
other folders find the same files.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from verl.trainer.checks import find_problems, get_setting
from verl.trainer.config import Config, TrainerConfig

CONFIG_ARGUMENT = "config"
CONFIG_FILE = "config.yaml"
RESULTS_FOLDER = "results"
USAGE = "usage: python3 -m verl.trainer.main config=examples/config.yaml data.train_files=train.csv key=value ..."
RESUME_KEYS = (
    "data.seed",
    "data.shuffle",
    "data.rollout_batch_size",
    "worker.actor.model.lora.rank",
    "worker.actor.model.lora.alpha",
    "worker.actor.model.freeze_vision_tower",
    "worker.actor.model.trainable_head",
)
"""What a run may not change when it continues: the order of the data, and which weights train."""


def load_config(argv: Sequence[str]) -> Config:
    """The settings that `argv` asks for, complete, checked, with absolute paths.

    `argv`: `config=FILE` at most once, and `key=value` in any order; later ones win, all of them over the file.
    Raises ValueError, naming key and remedy, for an unknown key, a value of the wrong kind, a missing setting, a file
    that is not there, and settings that do not go together.
    """
    merged = OmegaConf.structured(Config)
    arguments = [_split_argument(argument) for argument in argv]
    files = [value for key, value in arguments if key == CONFIG_ARGUMENT]
    if len(files) > 1:
        raise ValueError(f"{CONFIG_ARGUMENT}= is given {len(files)} times; one file at most")
    for file in files:
        merged = _merge(merged, _read_yaml(file), source=file)
    for key, value in arguments:
        if key != CONFIG_ARGUMENT:
            merged = _merge(merged, _read_override(key, value), source=f"{key}={value}")
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ValueError(f"not set: {', '.join(missing)}; give each as key=value\n{USAGE}")
    config = OmegaConf.to_object(merged)
    _make_paths_absolute(config)
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise ValueError with every setting that cannot be, or does not go with another, and how to mend each."""
    if problems := find_problems(config):
        raise ValueError("settings that cannot be:\n" + "\n".join(f"- {problem}" for problem in problems))


def save_config(config: Config, folder: Path) -> Path:
    """Write the complete settings into `folder` as YAML that `config=` reads again; returns the file."""
    path = Path(folder) / CONFIG_FILE
    OmegaConf.save(OmegaConf.structured(config), path)
    return path


def read_config(folder: Path) -> Config:
    """What `save_config` wrote into `folder`; paths in it need not exist any more. Raises ValueError if unreadable."""
    path = Path(folder) / CONFIG_FILE
    merged = _merge(OmegaConf.structured(Config), _read_yaml(str(path)), source=str(path))
    return OmegaConf.to_object(merged)


def check_resume(saved: Config, config: Config) -> None:
    """Raise ValueError if a run with the settings `saved` cannot be continued with those of `config`."""
    values = {key: (get_setting(saved, key), get_setting(config, key)) for key in RESUME_KEYS}
    changed = [f"{key}: {was} before, {asked} now" for key, (was, asked) in values.items() if was != asked]
    if changed:
        raise ValueError(
            "these settings may not change when a run continues: "
            + "; ".join(changed)
            + ". Set them back, or start a new run with another trainer.experiment_name"
        )


def output_folder(trainer: TrainerConfig) -> Path:
    """Where checkpoints and logs of a run go."""
    return Path(trainer.save_checkpoint_path or Path(RESULTS_FOLDER) / trainer.experiment_name).absolute()


def leaf_types(settings: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted key and declared type, e.g. ("worker.rollout.n", int)."""
    for name, kind in get_type_hints(settings).items():
        if is_dataclass(kind):
            yield from leaf_types(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _split_argument(argument: str) -> tuple[str, str]:
    key, separator, value = argument.partition("=")
    if not separator or not key or key.startswith("-"):
        raise ValueError(f"{argument}: not of the form key=value\n{USAGE}")
    return key.strip(), value


def _read_yaml(file: str) -> DictConfig:
    if not Path(file).is_file():
        raise ValueError(f"{CONFIG_ARGUMENT}={file}: no such file (from {Path.cwd()})")
    try:
        loaded = OmegaConf.load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{file}: not a mapping of keys to values")
    return loaded


def _read_override(key: str, value: str) -> DictConfig:
    """One `key=value`. Texts are taken as they stand: `experiment_name=007` is not the number 7."""
    if dict(leaf_types()).get(key) in (str, str | None) and value not in ("", "null", "~"):
        override = OmegaConf.create({})
        OmegaConf.update(override, key, value)
        return override
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value}: the value is not valid YAML: {error}") from error


def _merge(settings: DictConfig, changes: DictConfig, *, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(settings, changes)
    except ConfigKeyError as error:
        raise ValueError(f"{source}: unknown key {error.full_key}{_suggest(error.full_key)}") from error
    except OmegaConfBaseException as error:
        where = f" (key {error.full_key})" if error.full_key else ""
        raise ValueError(f"{source}: {str(error).splitlines()[0]}{where}") from error


def _suggest(key: str) -> str:
    """A hint at the settings and groups of settings that were probably meant by `key`."""
    leaves = [name for name, _ in leaf_types()]
    groups = {name[:end] for name in leaves for end, character in enumerate(name) if character == "."}
    known = [*leaves, *sorted(groups)]
    last = key.rpartition(".")[2]
    close = [name for name in known if name.endswith(f".{last}")]
    close += difflib.get_close_matches(key, known, n=2, cutoff=0.8)
    if not close:
        by_name = {name.rpartition(".")[2]: name for name in known}
        close = [by_name[name] for name in difflib.get_close_matches(last, by_name, n=2, cutoff=0.75)]
    return f"; did you mean {' or '.join(dict.fromkeys(close[:3]))}?" if close else ""


def _make_paths_absolute(config: Config) -> None:
    """Resolve paths against the working directory; ValueError for what must be there and is not."""
    data, model, trainer = config.data, config.worker.actor.model, config.trainer
    data.train_files = _existing(data.train_files, "data.train_files")
    data.val_files = _existing(data.val_files, "data.val_files")
    data.image_dir = _existing(data.image_dir, "data.image_dir")
    data.format_prompt = _existing(data.format_prompt, "data.format_prompt")
    model.head_path = _existing(model.head_path, "worker.actor.model.head_path")
    if os.path.isdir(model.model_path):
        model.model_path = os.path.abspath(model.model_path)
    elif model.model_path.startswith((".", "/", "~")) or model.model_path.count("/") != 1:
        raise ValueError(f"worker.actor.model.model_path={model.model_path}: no such folder (from {Path.cwd()})")
    trainer.load_checkpoint_path = _existing(trainer.load_checkpoint_path, "trainer.load_checkpoint_path")
    trainer.save_checkpoint_path = str(output_folder(trainer))
    reward = config.worker.reward
    path, separator, name = reward.reward_function.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"worker.reward.reward_function={reward.reward_function}: write it as path.py:function")
    reward.reward_function = f"{_existing(path, 'worker.reward.reward_function')}:{name}"


def _existing(path: str | None, key: str) -> str | None:
    if path is None:
        return None
    if not os.path.exists(path):
        raise ValueError(f"{key}={path}: no such file or folder (from {Path.cwd()})")
    return os.path.abspath(path)
