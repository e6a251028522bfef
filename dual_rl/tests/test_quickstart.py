"""The quick start of stage 2 as users start it, with the smallest sizes, and the table it ends with."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from training_support import DUAL_RL

SUMMARIZE = DUAL_RL / "examples" / "summarize_run.py"


def environment(**variables: object) -> dict[str, str]:
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


@pytest.fixture
def stage1(tmp_path) -> Path:
    """A folder as stage 1's quick start leaves it, with the example's clips for a world."""
    world = tmp_path / "stage1_quickstart" / "world"
    shutil.copytree(DUAL_RL / "data" / "videos", world / "videos")
    for name in ("train_rl.csv", "eval_rl.csv"):
        shutil.copy(DUAL_RL / "data" / "example.csv", world / name)
    rows = [f"videos/example_{number}_a.mp4,videos/example_{number}_b.mp4,a shape,A" for number in range(2)]
    (world / "bench_tabench.csv").write_text("\n".join(["video_A,video_B,prompt,answer", *rows, ""]))
    return world.parent


def test_quickstart_trains_and_shows_what_changed(stage1, small_model, tmp_path):
    work = tmp_path / "work"
    variables = environment(STAGE1=stage1, MODEL_PATH=small_model, WORK=work, STEPS=1, PROCESSES=1, BACKEND="hf")
    settings = [
        "worker.rollout.name=hf",
        "worker.rollout.n=2",
        "data.rollout_batch_size=4",
        "data.max_response_length=8",
    ]
    command = ["bash", str(DUAL_RL / "quickstart.sh"), *settings]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pair accuracy of the head" in result.stdout
    assert (work / "global_step_1" / "actor" / "huggingface" / "model.safetensors").is_file()
    assert "accuracy without ties" in result.stdout
    assert json.loads((work / "bench_tabench_step_1.json").read_text())["num_scored"] == 4


def test_quickstart_without_stage_1_says_what_to_run(tmp_path):
    command = ["bash", str(DUAL_RL / "quickstart.sh")]
    variables = environment(STAGE1=tmp_path)
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "run bash cold_start/quickstart.sh first" in result.stderr


def test_summary_shows_validations_and_quarters(tmp_path):
    def line(step: int, **values: float) -> dict:
        training = {"bt/loss": 0.8 - step / 10, "reward/overall/mean": step / 10, "timing/seconds/step": 2.0}
        return {"step": step, **training, **values}

    log = [
        {"step": 0, "val/reward/overall/mean": 0.25, "val/gsb_acc": 0.5},
        *(line(step) for step in range(1, 4)),
        line(4, **{"val/reward/overall/mean": 0.75, "val/gsb_acc": 0.625}),
    ]
    (tmp_path / "train_log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in log))
    result = subprocess.run(
        ["python", str(SUMMARIZE), str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    rows = {text[:30].strip(): text[30:].split() for text in result.stdout.splitlines() if text}
    assert rows["on held-out pairs, step"] == ["0", "4"]
    assert rows["pair accuracy of the head"] == ["0.500", "0.625"]
    assert rows["sub-scores right"] == ["-", "-"]
    assert rows["in training, up to step"] == ["1", "2", "3", "4"]
    assert rows["Bradley-Terry loss"] == ["0.700", "0.600", "0.500", "0.400"]


def test_summary_averages_runs(tmp_path):
    for seed, reward in ((1, 0.25), (2, 0.75)):
        lines = [{"step": step, "val/reward/overall/mean": reward, "bt/loss": reward, "reward/overall/mean": 0.5,
                  "timing/seconds/step": 1.0} for step in range(1 + seed)]  # fmt: skip
        (tmp_path / f"{seed}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = ["python", str(SUMMARIZE), str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = {line[:30].strip(): line[30:].split() for line in text.splitlines() if line}
    assert rows["on held-out pairs, step"] == ["0", "1"]
    assert rows["rule reward"] == ["0.500", "0.500"]


def test_summary_of_a_folder_without_log_says_so(tmp_path):
    command = ["python", str(SUMMARIZE), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "train_log.jsonl" in result.stderr
