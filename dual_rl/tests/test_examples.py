"""Scripts and files for users to run or copy name settings that exist, and every setting is used."""

import ast
import os
import re
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from ray.runtime_env import RuntimeEnv

from verl.config import Config
from verl.config_loading import leaf_types, load_config

STAGE_DIR = Path(__file__).resolve().parents[1]
REPOSITORY = STAGE_DIR.parent
EXAMPLES = STAGE_DIR / "examples"
MENTIONED = re.compile(r"(?<![\w./-])((?:data|algorithm|worker|trainer)\.[a-z_.]*[a-z_])=")
OPEN_SETTING = "worker.reward.reward_function_kwargs."
"""Below it users write keys of their own."""

WRITE_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%s\\0" "$PYTHONPATH" "$PYTHONSAFEPATH" "$@" > "$ARGUMENTS_FILE"\n'


@pytest.fixture
def caller(tmp_path, monkeypatch) -> Path:
    """A folder that a user calls from, with a model and data in it."""
    (tmp_path / "my" / "checkpoint-5").mkdir(parents=True)
    for name in ("train.csv", "val.csv", "head.pth"):
        (tmp_path / "my" / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_train_sh(caller: Path, *arguments: str, **variables: str) -> tuple[str, list[str]]:
    """Output, and what train.sh passes to Python: a `python3` on the PATH writes it down."""
    (caller / "bin").mkdir()
    python, passed = caller / "bin" / "python3", caller / "arguments"
    python.write_text(WRITE_ARGUMENTS)
    python.chmod(0o755)
    files = {"MODEL_PATH": "my/checkpoint-5", "TRAIN_FILES": "my/train.csv"}
    files |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "ARGUMENTS_FILE": str(passed), "PYTHONPATH": "mine"}
    command = ["bash", str(EXAMPLES / "train.sh"), *arguments]
    result = subprocess.run(command, env=os.environ | files | variables, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == passed.exists()
    return result.stdout + result.stderr, passed.read_text().split("\0")[:-1] if passed.exists() else []


def train_sh_config(caller: Path, *arguments: str, **variables: str) -> Config:
    output, passed = run_train_sh(caller, *arguments, **variables)
    assert passed, output
    python_path, safe_path, *passed = passed
    assert python_path == f"{STAGE_DIR}:mine"
    assert safe_path == "1", "a user's folder must not hide our modules or our libraries"
    assert passed[:2] == ["-m", "verl.trainer.main"]
    return load_config(passed[2:])


def test_train_sh_has_the_paper_s_settings_on_gpus(caller):
    config = train_sh_config(caller, NUM_GPUS="8", EXP_NAME="mine", HEAD_PATH="my/head.pth", VAL_FILES="my/val.csv")
    data, algorithm, actor, trainer = config.data, config.algorithm, config.worker.actor, config.trainer
    assert (config.worker.rollout.n, data.rollout_batch_size, actor.global_batch_size) == (8, 128, 128)
    assert (algorithm.disable_kl, algorithm.use_kl_loss) == (False, True)
    assert (algorithm.kl_penalty, algorithm.kl_coef) == ("low_var_kl", 1e-5)
    assert (actor.bt_weight, actor.optim.lr, actor.optim.weight_decay, actor.max_grad_norm) == (5e-3, 1e-6, 0.01, 1.0)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_dual) == (0.2, 0.3, 3.0)
    assert actor.model.model_path == str(caller / "my" / "checkpoint-5")
    assert actor.model.head_path == str(caller / "my" / "head.pth")
    assert (data.train_files, data.val_files) == (str(caller / "my" / "train.csv"), str(caller / "my" / "val.csv"))
    assert trainer.save_checkpoint_path == str(STAGE_DIR / "results" / "mine")
    assert (trainer.n_gpus_per_node, trainer.experiment_name) == (8, "mine")
    script = EXAMPLES / "reward_function" / "r1ta_subdim_head.py"
    assert config.worker.reward.reward_function == f"{script}:compute_score"


def test_train_sh_chooses_cpu_ranks_and_small_sizes_without_gpus_and_arguments_win(caller):
    settings = ["worker.rollout.n=4", "trainer.experiment_name=a b"]
    config = train_sh_config(caller, *settings, NUM_GPUS="0", NUM_PROCESSES="2", OUTPUT_DIR="o")
    trainer = config.trainer
    assert (trainer.n_gpus_per_node, trainer.n_cpu_ranks_per_node) == (0, 2)
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size) == (8, 8)
    assert (config.data.val_files, config.worker.actor.model.head_path) == (None, None)
    assert (config.worker.rollout.n, trainer.experiment_name) == (4, "a b")
    assert trainer.save_checkpoint_path == str(caller / "o")


@pytest.mark.parametrize("missing", ["MODEL_PATH", "TRAIN_FILES"])
def test_train_sh_asks_for_what_it_needs(caller, missing):
    output, passed = run_train_sh(caller, **{missing: ""})
    assert f"{missing}: set it to" in output
    assert not passed


def test_example_config_is_complete_from_the_stage_s_folder(caller, monkeypatch):
    monkeypatch.chdir(STAGE_DIR)
    required = [f"data.train_files={caller}/my/train.csv", f"worker.actor.model.model_path={caller}/my/checkpoint-5"]
    config = load_config(["config=examples/config.yaml", *required])
    assert Path(config.trainer.save_checkpoint_path) == STAGE_DIR / "results" / "dual_rl"


def test_runtime_environment_ships_the_code_and_nothing_else():
    settings = OmegaConf.to_container(OmegaConf.load(EXAMPLES / "runtime_env.yaml"))
    working_dir = settings.pop("working_dir")
    assert (STAGE_DIR / working_dir / "verl" / "trainer" / "main.py").is_file()
    assert RuntimeEnv(**settings)["excludes"]
    for pattern in settings["excludes"]:  # gitignore patterns: without a slash in front, data/ would be verl/data/ too
        assert pattern.startswith(("/", "**/__pycache__")), pattern


def test_every_setting_mentioned_anywhere_exists():
    known = {key for leaf, _ in leaf_types() for key in accumulate(leaf.split("."), "{}.{}".format)}
    texts = [path for kind in ("*.md", "*.sh", "*.yaml", "*.py") for path in STAGE_DIR.rglob(kind)]
    texts += [REPOSITORY / "README.md", REPOSITORY / "Makefile", *(REPOSITORY / ".ci").glob("*.sh")]
    mentioned = {
        (key, path.relative_to(REPOSITORY))
        for path in texts
        if path.is_file() and path != STAGE_DIR / "tests" / "test_settings.py"  # which has unknown keys on purpose
        for key in MENTIONED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(mentioned) > 20
    unknown = [entry for entry in mentioned if entry[0] not in known and not entry[0].startswith(OPEN_SETTING)]
    assert not unknown


def test_every_setting_is_read_by_the_code():
    names: set[str] = set()
    for path in (STAGE_DIR / "verl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # getattr(settings, "n")
    unread = [key for key, _ in leaf_types() if key.rpartition(".")[2] not in names]
    assert not unread
