"""What train.sh asks of DeepSpeed on machines with GPUs; programs that only print stand for theirs."""

import subprocess
from pathlib import Path

import pytest

from stage1_support import STAGE_DIR

PROGRAMS = {
    "nvidia-smi": "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-1)'",
    "python": 'echo "visible=$CUDA_VISIBLE_DEVICES $*"',
}


def run_script(folder: Path, **variables: str | None) -> subprocess.CompletedProcess:
    """train.sh on a machine with two GPUs; the last line that it writes is the call of DeepSpeed's stand-in."""
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "MASTER_PORT": "29500"}
    environment |= {name: value for name, value in variables.items() if value is not None}
    command = ["bash", str(STAGE_DIR / "train.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "expected"),
    [
        (None, None, ["visible= ", " --num_gpus 2 ", "/zero2.json ", "Qwen3-VL-8B"]),
        (None, "1", ["visible= ", " --num_gpus 1 ", "/zero0.json ", "Qwen3-VL-8B"]),
        ("1", None, ["visible=1 ", "runner --log_level warning --master_port", "/zero0.json "]),
        ("1,0", None, ["visible=1,0 ", "runner --log_level warning --master_port", "/zero2.json "]),
        ("1,0", "1", ["visible=1 ", "runner --log_level warning --master_port", "/zero0.json "]),
        ("", None, [" --num_gpus 1 ", "tiny_base"]),
        ("-1", None, [" --num_gpus 1 ", "tiny_base"]),
    ],
    ids=["all", "fewer", "a chosen one", "both in an order", "the first chosen one", "none", "none by -1"],
)
def test_the_gpus_that_the_user_chose_are_trained_on(tmp_path, visible, num_gpus, expected):
    call = run_script(tmp_path, CUDA_VISIBLE_DEVICES=visible, NUM_GPUS=num_gpus).stdout.splitlines()[-1]
    for part in expected:
        assert part in call
    assert "--lora_r" not in call  # what has a default is left to it


def test_a_node_without_its_rank_is_told_what_is_missing(tmp_path):
    result = run_script(tmp_path, HOSTFILE="hosts")
    assert result.returncode != 0
    assert "HOSTFILE needs NODE_RANK" in result.stderr
