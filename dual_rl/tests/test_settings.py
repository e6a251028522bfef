"""Settings: what files and arguments give, what is refused and with which words."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

from verl.config import Config
from verl.config_loading import CONFIG_FILE, leaf_types, load_config, save_config


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the required settings name."""
    (tmp_path / "model").mkdir()
    for name in ("train.csv", "val.csv", "reward.py", "head.pth", "prompt.jinja"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


REQUIRED = [
    "data.train_files=train.csv",
    "worker.actor.model.model_path=model",
    "worker.reward.reward_function=reward.py:compute_score",
]


def load(*arguments: str) -> Config:
    return load_config([*REQUIRED, *arguments])


def test_arguments_win_over_the_file_and_the_file_over_defaults(folder):
    (folder / "a.yaml").write_text("worker: {rollout: {n: 4, top_p: 0.5}}\ntrainer: {logger: [file]}")
    config = load("worker.rollout.n=6", "config=a.yaml", "data.seed=3", "data.seed=5")
    assert (config.worker.rollout.n, config.worker.rollout.top_p, config.worker.rollout.temperature) == (6, 0.5, 1.0)
    assert config.data.seed == 5
    assert config.trainer.logger == ["file"]


def test_paths_become_absolute_and_the_output_folder_has_its_default(folder):
    config = load(
        "data.val_files=val.csv",
        "data.format_prompt=prompt.jinja",
        "worker.actor.model.head_path=head.pth",
        "trainer.experiment_name=mine",
    )
    assert config.data.train_files == str(folder / "train.csv")
    assert config.data.val_files == str(folder / "val.csv")
    assert config.data.format_prompt == str(folder / "prompt.jinja")
    assert config.worker.actor.model.model_path == str(folder / "model")
    assert config.worker.actor.model.head_path == str(folder / "head.pth")
    assert config.worker.reward.reward_function == f"{folder}/reward.py:compute_score"
    assert config.trainer.output_folder == folder / "results" / "mine"
    os.chdir("/")
    assert config.trainer.output_folder == folder / "results" / "mine"


@pytest.mark.parametrize("name", ["007", "1e3", "2026-11-22", "a: b", "x=y", "yes", "[1]", "{a}", "# b"])
def test_texts_are_taken_as_they_stand(folder, name):
    assert load(f"trainer.experiment_name={name}").trainer.experiment_name == name


def test_values_of_all_kinds_are_read(folder):
    config = load(
        "trainer.logger=[console,wandb]",
        "worker.actor.optim.betas=[0.9,0.95]",
        "worker.rollout.val_override_config.n=4",
        "worker.reward.reward_function_kwargs.length=tokens",
        "data.val_files=null",
        "data.max_pixels=12544",
        "worker.actor.bt_weight=5e-3",
        "data.shuffle=false",
    )
    assert config.trainer.logger == ["console", "wandb"]
    assert config.worker.actor.optim.betas == (0.9, 0.95)
    sampling = config.worker.rollout.val_override_config
    assert (sampling.n, sampling.temperature, sampling.top_p) == (4, 0.0, None)
    assert config.worker.reward.reward_function_kwargs == {"length": "tokens"}
    assert (config.data.val_files, config.data.max_pixels, config.data.shuffle) == (None, 12544, False)
    assert config.worker.actor.bt_weight == 5e-3


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("algorithm.kl_coeff=1", "unknown key algorithm.kl_coeff; did you mean algorithm.kl_coef"),
        ("rollout.n=4", "unknown key rollout; did you mean worker.rollout?"),
        ("worker.actor.clip_ratio=0.2", "did you mean worker.actor.clip_ratio_"),
        ("qqqq=1", "unknown key qqqq"),
        ("worker.actor.clip_low=0.2", "did you mean worker.actor.clip_ratio_low"),
        ("trainer.lr=1", "did you mean worker.actor.optim.lr"),
        ("worker.rollout.n=many", "worker.rollout.n=many must be a valid integer"),
        ("worker.rollout.n=2.5", "worker.rollout.n=2.5 must be a valid integer"),
        ("worker.rollout.n=true", "worker.rollout.n=True must be a valid integer"),
        ("worker.rollout.n=1", "worker.rollout.n=1 must be greater than or equal to 2"),
        ("worker.rollout.temperature=0", "worker.rollout.temperature=0 must be greater than 0"),
        ("worker.rollout.val_override_config.top=1", "unknown key worker.rollout.val_override_config.top"),
        ("worker.rollout.val_override_config.n=0", "worker.rollout.val_override_config.n=0 must be"),
        ("worker.ref.offload.offload_optimizer=true", "unknown key worker.ref.offload.offload_optimizer"),
        ("worker.actor.clip_ratio_dual=1", "must be greater than 1"),
        ("worker.actor.optim.betas=[0.9,1.0]", "worker.actor.optim.betas.1=1.0 must be less than 1"),
        ("worker.actor.optim.betas=[0.9]", "worker.actor.optim.betas"),
        ("worker.actor.optim.lr=.nan", "worker.actor.optim.lr=nan must be a finite number"),
        ("data.max_dropped_share=1", "data.max_dropped_share=1 must be less than 1"),
        ("algorithm.kl_penalty=k3", "'low_var_kl'"),
        ("trainer.logger=console", "trainer.logger=console must be a valid array"),
        ("trainer.logger=[console,mlflow]", "trainer.logger.1=mlflow must be 'console'"),
        ("trainer.save_limit=0", "trainer.save_limit=0 must be -1 or at least 1"),
        ("trainer.logger=[console", "trainer.logger=[console: the value is not valid YAML"),
        ("worker.rollout.n", "is not of the form key=value"),
        ("--worker.rollout.n=4", "is not of the form key=value"),
        ("config=missing.yaml", "config=missing.yaml: no such file"),
        ("data.train_files=missing.csv", "data.train_files=missing.csv: no such file"),
        ("worker.actor.model.model_path=./missing", "no such folder"),
        ("worker.actor.model.model_path=a/b/c", "no such folder"),
        ("worker.reward.reward_function=reward.py", "path.py:function"),
        ("worker.reward.reward_function=missing.py:f", "missing.py: no such file"),
        ("trainer.load_checkpoint_path=global_step_4", "global_step_4: no such file"),
        ("trainer.experiment_name=a/b", "no slashes"),
    ],
)
def test_mistakes_are_named(folder, argument, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(argument)


def test_missing_settings_are_listed():
    with pytest.raises(ValueError, match=r"not set: data\.train_files, .*model_path, .*reward_function\."):
        load_config([])


def test_mistakes_in_a_file_name_the_file(folder):
    (folder / "a.yaml").write_text("worker: {rollout: {m: 4}}")
    with pytest.raises(ValueError, match=r"a\.yaml: .*unknown key worker\.rollout\.m"):
        load("config=a.yaml")
    (folder / "b.yaml").write_text("worker: {rollout")
    with pytest.raises(ValueError, match=r"b\.yaml is not valid YAML"):
        load("config=b.yaml")
    (folder / "c.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"c\.yaml is not a mapping"):
        load("config=c.yaml")
    with pytest.raises(ValueError, match="2 times"):
        load("config=a.yaml", "config=b.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.rollout_batch_size=10", "worker.actor.global_batch_size=4"], "is not a multiple"),
        (["worker.actor.global_batch_size=2", "trainer.n_gpus_per_node=4"], "leave some of the 4 ranks"),
        (["worker.rollout.tensor_parallel_size=2"], "does not divide the 1 rank(s) of a node"),
        (["trainer.n_gpus_per_node=3", "worker.actor.fsdp.fsdp_size=2"], "worker.actor.fsdp.fsdp_size=2 does not"),
        (
            ["trainer.n_gpus_per_node=2", "worker.rollout.tensor_parallel_size=2", "worker.rollout.name=hf"],
            "name=vllm",
        ),
        (["algorithm.use_kl_loss=false", "algorithm.kl_penalty=full"], "algorithm.use_kl_loss=true"),
        (["algorithm.online_filtering=true", "algorithm.filter_low=1"], "algorithm.filter_high"),
        (["worker.actor.model.lora.rank=8", "worker.actor.model.freeze_vision_tower=false"], "lora.rank=0"),
        (["worker.actor.fsdp.enable_cpu_offload=true", "worker.actor.offload.offload_params=true"], "Leave out"),
        (["trainer.val_only=true"], "data.val_files"),
        (["data.min_pixels=9", "data.max_pixels=8"], "data.min_pixels=9"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(folder, arguments, words):
    with pytest.raises(ValueError, match="settings do not fit together") as error:
        load(*arguments)
    assert words in str(error.value)


def test_all_problems_come_at_once(folder):
    with pytest.raises(ValueError, match=r"(?s)algorithm\.filter_low.*trainer\.val_only"):
        load("trainer.val_only=true", "algorithm.online_filtering=true", "algorithm.filter_low=1")
    (folder / "a.yaml").write_text("worker: {rollout: {n: 0}}\ntrainer: {nodes: 2}")
    with pytest.raises(ValueError, match=r"(?s)a\.yaml: worker\.rollout\.n=0.*unknown key trainer\.nodes"):
        load("config=a.yaml")


def test_ranks_are_gpus_or_cpu_processes(folder):
    assert load("trainer.n_gpus_per_node=4", "trainer.nnodes=2").trainer.num_ranks == 8
    assert load("trainer.n_gpus_per_node=0", "trainer.n_cpu_ranks_per_node=3").trainer.num_ranks == 3


def test_saved_settings_load_again_unchanged(folder, tmp_path_factory):
    config = load("worker.rollout.n=3", "worker.reward.reward_function_kwargs.x=[1,2]", "data.val_files=val.csv")
    elsewhere = tmp_path_factory.mktemp("checkpoint")
    path = save_config(config, elsewhere)
    assert path == elsewhere / CONFIG_FILE
    assert load_config([f"config={path}"]) == config


def test_every_setting_is_found_by_its_dotted_key():
    keys = dict(leaf_types())
    assert keys["worker.rollout.n"] is int
    assert keys["data.val_files"] == str | None
    assert not any(dataclasses.is_dataclass(kind) for kind in keys.values())
