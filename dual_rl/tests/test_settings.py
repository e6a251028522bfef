"""Settings: what files and arguments give, what is refused; scripts name real ones; what makes a run the same run."""

import ast
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from ray.runtime_env import RuntimeEnv

from descore.format_prompt import FormatPrompt
from model_support import DUAL_RL, make_pair
from verl.config import Config
from verl.config_loading import leaf_types, load_config, save_config
from verl.data.scored_sequence import DEFAULT_FORMAT_PROMPT, REWARD_TOKEN, VIDEO_PLACEHOLDER, judge_problem
from verl.model.reward_files import load_checkpoint
from verl.trainer.inputs import Identity, describe_run, read_identity, require_same_run

REPOSITORY, EXAMPLES = DUAL_RL.parent, DUAL_RL / "examples"
MENTIONED = re.compile(r"(?<![\w./-])((?:data|algorithm|worker|trainer)\.[a-z_.]*[a-z_])=")
OPEN_SETTING = "worker.reward.reward_function_kwargs."
"""Below it users write keys of their own."""
WRITE_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%s\\0" "$PYTHONPATH" "$PYTHONSAFEPATH" "$@" > "$ARGUMENTS_FILE"\n'


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


def test_arguments_win_over_the_file_and_the_file_over_defaults_and_all_is_saved(folder, tmp_path_factory):
    (folder / "a.yaml").write_text("worker: {rollout: {n: 4, top_p: 0.5}}\ntrainer: {logger: [file]}")
    config = load("worker.rollout.n=6", "config=a.yaml", "data.seed=3", "data.seed=5", "data.val_files=val.csv")
    assert (config.worker.rollout.n, config.worker.rollout.top_p, config.worker.rollout.temperature) == (6, 0.5, 1.0)
    assert (config.data.seed, config.trainer.logger) == (5, ["file"])
    path = save_config(config, tmp_path_factory.mktemp("checkpoint"))
    assert load_config([f"config={path}"]) == config


def test_paths_become_absolute(folder):
    config = load("data.val_files=val.csv", "worker.actor.model.head_path=head.pth", "trainer.experiment_name=mine")
    model = config.worker.actor.model
    found = [config.data.train_files, config.data.val_files, model.model_path, model.head_path]
    assert found == [str(folder / name) for name in ("train.csv", "val.csv", "model", "head.pth")]
    assert config.worker.reward.reward_function == f"{folder}/reward.py:compute_score"
    assert config.trainer.output_folder == folder / "results" / "mine"


def test_values_of_all_types_are_read_and_strings_literally(folder):
    values = ["trainer.logger=[console,wandb]", "worker.actor.optim.betas=[0.9,0.95]", "data.val_files=null"]
    values += ["worker.rollout.val_override_config.n=4", "worker.reward.reward_function_kwargs.length=tokens"]
    config = load(*values, "worker.actor.bt_weight=5e-3", "data.shuffle=false")
    assert (config.trainer.logger, config.worker.actor.optim.betas) == (["console", "wandb"], (0.9, 0.95))
    sampling = config.worker.rollout.val_override_config
    assert (sampling.n, sampling.temperature, sampling.top_p) == (4, 0.0, None)
    assert config.worker.reward.reward_function_kwargs == {"length": "tokens"}
    assert (config.data.val_files, config.data.shuffle, config.worker.actor.bt_weight) == (None, False, 5e-3)
    for name in ("007", "a: b", "yes", "[1]"):
        assert load(f"trainer.experiment_name={name}").trainer.experiment_name == name


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("algorithm.kl_coeff=1", "unknown key algorithm.kl_coeff"),
        ("worker.rollout.n=1", "worker.rollout.n=1 must be greater than or equal to 2"),
        ("worker.actor.optim.lr=.nan", "worker.actor.optim.lr=nan must be a finite number"),
        ("trainer.logger=[console,mlflow]", "trainer.logger.1=mlflow must be 'console'"),
        ("trainer.logger=[console", "trainer.logger=[console: the value is not valid YAML"),
        ("config=missing.yaml", "config=missing.yaml"),
        ("data.train_files=missing.csv", "data.train_files=missing.csv: no such file"),
        ("worker.actor.model.model_path=./missing", "no such folder"),
        ("worker.reward.reward_function=reward.py", "path.py:function"),
    ],
)
def test_mistakes_are_named(folder, argument, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load(argument)


def test_all_mistakes_in_a_file_are_listed(folder):
    (folder / "a.yaml").write_text("worker: {rollout: {n: 0}}\ntrainer: {nodes: 2}")
    with pytest.raises(ValueError, match=r"(?s)worker\.rollout\.n=0.*unknown key trainer\.nodes"):
        load("config=a.yaml")
    (folder / "a.yaml").write_text("worker: {rollout")
    with pytest.raises(ValueError, match=r"a\.yaml"):
        load("config=a.yaml")
    with pytest.raises(ValueError, match=r"not set: data\.train_files, .*model_path, .*reward_function\."):
        load_config([])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.rollout_batch_size=10", "worker.actor.global_batch_size=4"], "is not a multiple"),
        (["worker.actor.global_batch_size=2", "trainer.n_gpus_per_node=4"], "leave some of the 4 ranks"),
        (["worker.rollout.tensor_parallel_size=2"], "does not divide the 1 rank(s) of a node"),
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


def run_train_sh(folder: Path, *arguments: str, **variables: str) -> tuple[str, list[str]]:
    """Output, and what train.sh passes to Python: a `python3` on the PATH writes it down."""
    (folder / "bin").mkdir()
    python, passed = folder / "bin" / "python3", folder / "arguments"
    python.write_text(WRITE_ARGUMENTS)
    python.chmod(0o755)
    files = {"MODEL_PATH": "model", "TRAIN_FILES": "train.csv", "PYTHONPATH": "mine"}
    files |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "ARGUMENTS_FILE": str(passed)}
    command = ["bash", str(EXAMPLES / "train.sh"), *arguments]
    result = subprocess.run(command, env=os.environ | files | variables, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == passed.exists()
    return result.stdout + result.stderr, passed.read_text().split("\0")[:-1] if passed.exists() else []


def train_sh_config(folder: Path, *arguments: str, **variables: str) -> Config:
    output, passed = run_train_sh(folder, *arguments, **variables)
    assert passed, output
    assert passed[0] == f"{DUAL_RL}:mine"
    assert passed[1] == "1", "a user's folder must not hide our modules or our libraries"
    assert passed[2:4] == ["-m", "verl.trainer.main"]
    return load_config(passed[4:])


def test_train_sh_has_the_paper_s_settings_on_gpus(folder):
    config = train_sh_config(folder, NUM_GPUS="8", EXP_NAME="mine", HEAD_PATH="head.pth", VAL_FILES="val.csv")
    data, algorithm, actor, trainer = config.data, config.algorithm, config.worker.actor, config.trainer
    assert (config.worker.rollout.n, data.rollout_batch_size, actor.global_batch_size) == (8, 128, 128)
    assert (algorithm.disable_kl, algorithm.use_kl_loss) == (False, True)
    assert (algorithm.kl_penalty, algorithm.kl_coef) == ("low_var_kl", 1e-5)
    assert (actor.bt_weight, actor.optim.lr, actor.optim.weight_decay, actor.max_grad_norm) == (5e-3, 1e-6, 0.01, 1.0)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_dual) == (0.2, 0.3, 3.0)
    assert (actor.model.model_path, actor.model.head_path) == (str(folder / "model"), str(folder / "head.pth"))
    assert (data.train_files, data.val_files) == (str(folder / "train.csv"), str(folder / "val.csv"))
    assert trainer.save_checkpoint_path == str(DUAL_RL / "results" / "mine")
    assert trainer.n_gpus_per_node == 8
    script = EXAMPLES / "reward_function" / "r1ta_subdim_head.py"
    assert config.worker.reward.reward_function == f"{script}:compute_score"


def test_train_sh_chooses_cpu_ranks_and_small_sizes_without_gpus_and_arguments_win(folder):
    settings = ["worker.rollout.n=4", "trainer.experiment_name=a b"]
    config = train_sh_config(folder, *settings, NUM_GPUS="0", NUM_PROCESSES="2", OUTPUT_DIR="o")
    assert (config.trainer.n_gpus_per_node, config.trainer.n_cpu_ranks_per_node) == (0, 2)
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size) == (8, 8)
    assert (config.data.val_files, config.worker.actor.model.head_path) == (None, None)
    assert (config.worker.rollout.n, config.trainer.experiment_name) == (4, "a b")
    assert config.trainer.save_checkpoint_path == str(folder / "o")
    result = subprocess.run(["bash", str(EXAMPLES / "train.sh")], capture_output=True, text=True)
    assert (result.returncode, "MODEL_PATH: set it to" in result.stderr) == (1, True)


def test_example_config_is_complete_from_the_stage_s_folder_and_the_environment_ships_the_code(folder, monkeypatch):
    monkeypatch.chdir(DUAL_RL)
    required = [f"data.train_files={folder}/train.csv", f"worker.actor.model.model_path={folder}/model"]
    config = load_config(["config=examples/config.yaml", *required])
    assert Path(config.trainer.save_checkpoint_path) == DUAL_RL / "results" / "dual_rl"
    settings = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "runtime_env.yaml"))
    assert (DUAL_RL / settings.pop("working_dir") / "verl" / "trainer" / "main.py").is_file()
    for pattern in RuntimeEnv(**settings)["excludes"]:  # without a slash in front, data/ would be verl/data/ too
        assert pattern.startswith(("/", "**/__pycache__")), pattern


def test_every_setting_mentioned_anywhere_exists_and_every_setting_is_read_by_the_code():
    known = {key for leaf, _ in leaf_types() for key in accumulate(leaf.split("."), "{}.{}".format)}
    texts = [path for kind in ("*.md", "*.sh", "*.yaml", "*.py") for path in DUAL_RL.rglob(kind)]
    texts = [path for path in [*texts, REPOSITORY / "README.md", REPOSITORY / "Makefile"] if path != Path(__file__)]
    mentioned = {(key, path) for path in texts for key in MENTIONED.findall(path.read_text(encoding="utf-8"))}
    assert len(mentioned) > 20
    assert not [entry for entry in mentioned if entry[0] not in known and not entry[0].startswith(OPEN_SETTING)]
    nodes = [node for path in (DUAL_RL / "verl").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not [key for key, _ in leaf_types() if key.rpartition(".")[2] not in names]


PROBLEM = "  <video>\nDoes it show {a red circle}? 100%\n"


@pytest.mark.parametrize("name", ["content", "judge", "subdim", "think_answer"])
def test_shipped_format_prompts_hold_the_problem_and_one_video(name):
    form = FormatPrompt((EXAMPLES / "format_prompt" / f"{name}.jinja").read_text(encoding="utf-8"))
    if name == "judge":
        assert form.render("a red circle {moves} 100%\n") == judge_problem("a red circle {moves} 100%\n")
    elif name == "content":
        assert form.render(PROBLEM) == FormatPrompt(DEFAULT_FORMAT_PROMPT).render(PROBLEM)
    else:
        assert form.render(PROBLEM).startswith(PROBLEM.strip() + "\n\n")
    text = form.render("a red circle" if name == "judge" else PROBLEM)
    assert (text.count(VIDEO_PLACEHOLDER), text == text.strip()) == (1, True)
    assert not any(unwanted in text for unwanted in ("{#", "data.", REWARD_TOKEN))


PAIRS = [make_pair(pair_id) for pair_id in range(3)]


def describe(folder: Path, *, pairs=PAIRS, fps: float | None = None, seed: int = 1, alpha: int = 128) -> Identity:
    config = Config()
    config.worker.actor.model.model_path = str(folder)
    config.data.seed, config.worker.actor.model.lora.alpha = seed, alpha
    checkpoint = load_checkpoint(folder, with_weights=False)
    budget = checkpoint.video_budget.replace(fps=fps)
    return json.loads(json.dumps(describe_run(config, replace(checkpoint, video_budget=budget), pairs)))


def test_a_run_is_the_same_wherever_model_and_videos_are_and_another_one_is_refused(small_model, tmp_path):
    moved = Path(shutil.copytree(small_model, tmp_path / "moved"))
    before = describe(small_model)
    other_videos = [replace(pair, videos=("/new/a.mp4", "/new/b.mp4")) for pair in PAIRS]
    require_same_run(before, describe(moved, pairs=other_videos), checkpoint=Path("global_step_2"))
    changed = describe(small_model, pairs=[*PAIRS[:2], replace(PAIRS[2], answer="B")], fps=1.0, seed=2, alpha=8)
    with pytest.raises(ValueError, match="global_step_2 belongs to another run: ") as raised:
        require_same_run(before, changed, checkpoint=Path("global_step_2"))
    for words in ("data.seed was 1 and is 2", "lora.alpha was 128 and is 8", "other training data", "other frames"):
        assert words in str(raised.value)
    assert "weights" not in str(raised.value)
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"another run: other weights\. Set"):
        require_same_run(before, describe(moved), checkpoint=Path("global_step_2"))


def test_older_checkpoints_without_one_record_are_read_from_their_parts(small_model, tmp_path):
    """Data order beside the stream's position, the model beside that, settings in YAML."""
    now = describe(small_model)
    stream = {"epoch": 1, "batch_in_epoch": 0, "batch_size": 128, "shuffle": True, "seed": 1}
    stream["fingerprint"] = now["training data"]
    config = Config()
    config.worker.actor.model.lora.alpha = 64
    save_config(config, tmp_path)
    parts = {name: now[name] for name in ("weights", "frames", "format prompt")}
    saved = read_identity(tmp_path, {"stream": stream, "model": parts})
    assert saved == now | {"worker.actor.model.lora.alpha": 64}
    assert read_identity(tmp_path, {"identity": now, "stream": {}}) == now
