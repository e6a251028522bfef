"""What train.sh asks of DeepSpeed on machines with GPUs; programs that only print stand for theirs."""

import subprocess
from pathlib import Path

import pytest

from stage1_support import STAGE_DIR

TWO_GPUS = "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-1)'\n"
PRINT_CALL = '#!/bin/sh\necho "visible=$CUDA_VISIBLE_DEVICES $*"\n'


@pytest.fixture
def programs(tmp_path) -> Path:
    for name, script in {"nvidia-smi": TWO_GPUS, "python": PRINT_CALL}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "num_gpus", "expected", "zero"),
    [
        (None, None, "visible= -m deepspeed.launcher.runner --log_level warning --num_gpus 2 ", "zero2"),
        (None, "1", "visible= -m deepspeed.launcher.runner --log_level warning --num_gpus 1 ", "zero0"),
        ("1", None, "visible=1 -m deepspeed.launcher.runner --log_level warning --master_port", "zero0"),
        ("1,0", None, "visible=1,0 -m deepspeed.launcher.runner --log_level warning --master_port", "zero2"),
        ("1,0", "1", "visible=1 -m deepspeed.launcher.runner --log_level warning --master_port", "zero0"),
    ],
    ids=["all", "fewer", "a chosen one", "both in an order", "the first chosen one"],
)
def test_the_gpus_that_the_user_chose_are_trained_on(programs, visible, num_gpus, expected, zero):
    call = run_script(programs, visible, num_gpus)
    assert call.startswith(expected)
    assert f"/{zero}.json " in call
    assert "Qwen3-VL-8B" in call
    assert "--lora_r" not in call  # what has a default is left to it


@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_gpu_is_used_where_none_is_visible(programs, visible):
    call = run_script(programs, visible, None)
    assert "--num_gpus 1 " in call
    assert "tiny_base" in call


def run_script(programs: Path, visible: str | None, num_gpus: str | None) -> str:
    """The line that DeepSpeed's stand-in printed."""
    environment = {"PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", "MASTER_PORT": "29500"}
    chosen = {"CUDA_VISIBLE_DEVICES": visible, "NUM_GPUS": num_gpus}
    environment |= {name: value for name, value in chosen.items() if value is not None}
    command = ["bash", str(STAGE_DIR / "train.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return run.stdout.splitlines()[-1]
