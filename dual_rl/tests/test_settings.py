"""Settings: what files and arguments give, what is refused, and that the message names key and remedy."""

import os
import re
from pathlib import Path

import pytest

from verl.config import Config
from verl.config_loading import load_config, save_config


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the required settings name."""
    (tmp_path / "model").mkdir()
    for name in ("train.csv", "val.csv", "reward.py", "head.pth"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*arguments: str) -> Config:
    required = [
        "data.train_files=train.csv",
        "worker.actor.model.model_path=model",
        "worker.reward.reward_function=reward.py:compute_score",
    ]
    return load_config([*required, *arguments])


def test_arguments_win_over_the_file_and_the_file_over_defaults(folder):
    (folder / "a.yaml").write_text("worker: {rollout: {n: 4, top_p: 0.5}}\ntrainer: {logger: [file]}")
    config = load("worker.rollout.n=6", "config=a.yaml", "data.seed=3", "data.seed=5")
    assert (config.worker.rollout.n, config.worker.rollout.top_p, config.worker.rollout.temperature) == (6, 0.5, 1.0)
    assert config.data.seed == 5
    assert config.trainer.logger == ["file"]


def test_paths_become_absolute(folder):
    config = load("data.val_files=val.csv", "worker.actor.model.head_path=head.pth", "trainer.experiment_name=mine")
    os.chdir("/")
    assert (config.data.train_files, config.data.val_files) == (str(folder / "train.csv"), str(folder / "val.csv"))
    assert config.worker.actor.model.model_path == str(folder / "model")
    assert config.worker.actor.model.head_path == str(folder / "head.pth")
    assert config.worker.reward.reward_function == f"{folder}/reward.py:compute_score"
    assert config.trainer.output_folder == folder / "results" / "mine"


@pytest.mark.parametrize("name", ["007", "a: b", "yes", "[1]"])
def test_strings_are_taken_literally(folder, name):
    assert load(f"trainer.experiment_name={name}").trainer.experiment_name == name


def test_values_of_all_types_are_read(folder):
    config = load(
        "trainer.logger=[console,wandb]",
        "worker.actor.optim.betas=[0.9,0.95]",
        "worker.rollout.val_override_config.n=4",
        "worker.reward.reward_function_kwargs.length=tokens",
        "data.val_files=null",
        "worker.actor.bt_weight=5e-3",
        "data.shuffle=false",
    )
    assert config.trainer.logger == ["console", "wandb"]
    assert config.worker.actor.optim.betas == (0.9, 0.95)
    sampling = config.worker.rollout.val_override_config
    assert (sampling.n, sampling.temperature, sampling.top_p) == (4, 0.0, None)
    assert config.worker.reward.reward_function_kwargs == {"length": "tokens"}
    assert (config.data.val_files, config.data.shuffle, config.worker.actor.bt_weight) == (None, False, 5e-3)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("algorithm.kl_coeff=1", "unknown key algorithm.kl_coeff"),
        ("worker.rollout.n=2.5", "worker.rollout.n=2.5 must be a valid integer"),
        ("worker.rollout.n=1", "worker.rollout.n=1 must be greater than or equal to 2"),
        ("worker.actor.optim.lr=.nan", "worker.actor.optim.lr=nan must be a finite number"),
        ("trainer.logger=[console,mlflow]", "trainer.logger.1=mlflow must be 'console'"),
        ("trainer.save_limit=0", "trainer.save_limit=0 must be -1 or at least 1"),
        ("trainer.logger=[console", "trainer.logger=[console: the value is not valid YAML"),
        ("--worker.rollout.n=4", "is not of the form key=value"),
        ("config=missing.yaml", "config=missing.yaml cannot be read"),
        ("data.train_files=missing.csv", "data.train_files=missing.csv: no such file"),
        ("worker.actor.model.model_path=./missing", "no such folder"),
        ("worker.reward.reward_function=reward.py", "path.py:function"),
    ],
)
def test_mistakes_are_named(folder, argument, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(argument)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "worker: {rollout: {n: 0}}\ntrainer: {nodes: 2}",
            r"worker\.rollout\.n=0.*unknown key trainer\.nodes",
        ),
        ("worker: {rollout", r"a\.yaml cannot be read"),
        ("- 1", r"a\.yaml is not a mapping"),
    ],
)
def test_all_mistakes_in_a_file_are_listed(folder, content, words):
    (folder / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load("config=a.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.rollout_batch_size=10", "worker.actor.global_batch_size=4"], "is not a multiple"),
        (["worker.actor.global_batch_size=2", "trainer.n_gpus_per_node=4"], "leave some of the 4 ranks"),
        (["worker.rollout.tensor_parallel_size=2"], "does not divide the 1 rank(s) of a node"),
        (["trainer.n_gpus_per_node=3", "worker.actor.fsdp.fsdp_size=2"], "worker.actor.fsdp.fsdp_size=2 does not"),
        (["worker.rollout.tensor_parallel_size=2", "worker.rollout.name=hf"], "name=vllm"),
        (["worker.rollout.quantization=fp8", "trainer.n_gpus_per_node=0"], "need vllm on a GPU"),
        (["algorithm.use_kl_loss=false", "algorithm.kl_penalty=full"], "algorithm.use_kl_loss=true"),
        (["worker.actor.model.lora.rank=8", "worker.actor.model.freeze_vision_tower=false"], "lora.rank=0"),
        (["worker.actor.fsdp.enable_cpu_offload=true", "worker.actor.offload.offload_params=true"], "Leave out"),
        (["trainer.val_only=true"], "data.val_files"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(folder, arguments, words):
    with pytest.raises(ValueError, match="settings do not fit together") as error:
        load(*arguments)
    assert words in str(error.value)


def test_missing_settings_are_listed():
    with pytest.raises(ValueError, match=r"not set: data\.train_files, .*model_path, .*reward_function\."):
        load_config([])


def test_saved_settings_load_again_unchanged(folder, tmp_path_factory):
    config = load("worker.rollout.n=3", "worker.reward.reward_function_kwargs.x=[1,2]", "data.val_files=val.csv")
    path = save_config(config, tmp_path_factory.mktemp("checkpoint"))
    assert load_config([f"config={path}"]) == config
