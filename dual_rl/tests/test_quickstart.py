"""The quick start of stage 2 as users start it, with the smallest sizes, and the table it ends with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training_support import DUAL_RL


def run(*command: object, **variables: object) -> subprocess.CompletedProcess:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
def test_quickstart_trains_and_shows_what_changed(small_model, tmp_path):
    """From a folder as stage 1's quick start leaves it, with the example's clips for a world."""
    world, work = tmp_path / "stage1_quickstart" / "world", tmp_path / "work"
    shutil.copytree(DUAL_RL / "data" / "videos", world / "videos")
    for name in ("train_rl.csv", "eval_rl.csv"):
        shutil.copy(DUAL_RL / "data" / "example.csv", world / name)
    rows = [f"videos/example_{index}_a.mp4,videos/example_{index}_b.mp4,a shape,A" for index in range(2)]
    (world / "bench_tabench.csv").write_text("\n".join(["video_A,video_B,prompt,answer", *rows, ""]))
    settings = ["worker.rollout.name=hf", "worker.rollout.n=2"]
    settings += ["data.rollout_batch_size=4", "data.max_response_length=8"]
    variables = {"STAGE1": world.parent, "MODEL_PATH": small_model, "WORK": work, "STEPS": 1, "PROCESSES": 1}
    result = run("bash", DUAL_RL / "quickstart.sh", *settings, BACKEND="hf", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pair accuracy of the head" in result.stdout
    assert "accuracy without ties" in result.stdout
    assert (work / "global_step_1" / "actor" / "huggingface" / "model.safetensors").is_file()
    assert json.loads((work / "bench_tabench_step_1.json").read_text())["num_scored"] == 4


def test_quickstart_without_stage_1_says_what_to_run(tmp_path):
    result = run("bash", DUAL_RL / "quickstart.sh", STAGE1=tmp_path)
    assert result.returncode == 1
    assert "run bash cold_start/quickstart.sh first" in result.stderr


def summarize(*runs: Path) -> dict[str, list[str]]:
    """Cells of the table by the label of the row."""
    result = run(sys.executable, DUAL_RL / "examples" / "summarize_run.py", *runs)
    assert result.returncode == 0, result.stderr
    return {text[:30].strip(): text[30:].split() for text in result.stdout.splitlines() if text}


def write_log(path: Path, *lines: dict) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def step(number: int, **values: float) -> dict:
    training = {"bt/loss": 0.8 - number / 10, "reward/overall/mean": number / 10, "timing/seconds/step": 2.0}
    return {"step": number, **training, **values}


def test_summary_shows_validations_and_quarters_of_the_training(tmp_path):
    first = {"step": 0, "val/reward/overall/mean": 0.25, "val/gsb_acc": 0.5}
    last = step(4, **{"val/reward/overall/mean": 0.75, "val/gsb_acc": 0.625})
    write_log(tmp_path / "train_log.jsonl", first, step(1), step(2), step(3), last)
    rows = summarize(tmp_path)
    assert rows["on held-out pairs, step"] == ["0", "4"]
    assert rows["pair accuracy of the head"] == ["0.500", "0.625"]
    assert rows["sub-scores right"] == ["-", "-"]
    assert rows["in training, up to step"] == ["1", "2", "3", "4"]
    assert rows["Bradley-Terry loss"] == ["0.700", "0.600", "0.500", "0.400"]


def test_summary_averages_the_steps_that_all_runs_have(tmp_path):
    runs = {"1": 0.25, "2": 0.75}
    for name, accuracy in runs.items():
        values = {"val/reward/overall/mean": 1.0, "val/gsb_acc": accuracy}
        write_log(tmp_path / name, *(step(number, **values) for number in range(1 + int(name))))
    rows = summarize(*(tmp_path / name for name in runs))
    assert rows["on held-out pairs, step"] == ["0", "1"]
    assert rows["pair accuracy of the head"] == ["0.500", "0.500"]


def test_summary_of_a_folder_without_a_log_says_so(tmp_path):
    result = run(sys.executable, DUAL_RL / "examples" / "summarize_run.py", tmp_path)
    assert (result.returncode, "train_log.jsonl" in result.stderr) == (1, True)
