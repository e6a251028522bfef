"""The kernels of rollouts, in Triton's interpreter, which must be chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    "arguments",
    [
        ["interpreted_kernels.py"],
        # An engine that draws by the kernel keeps what engines promise.
        pytest.param(["test_rollout_engines.py", "-k", "vllm and not hf"], marks=pytest.mark.slow),
        pytest.param(["test_scoring.py", "-m", "", "-k", "several_thoughts and vllm"], marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    folder = Path(__file__).resolve().parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
