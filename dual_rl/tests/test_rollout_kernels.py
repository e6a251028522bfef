"""The kernels of rollouts, in Triton's interpreter, which has to be chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout_support import CPU
from verl.config import RolloutConfig
from verl.rollout.shared_prompt import find_obstacle, find_obstacle_in_vllm

TESTS = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def run_interpreted(*arguments: str) -> str:
    """What pytest says about `arguments` in a process of its own, where everything has to pass."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@needs_triton
def test_kernels_do_what_torch_does():
    assert "passed" in run_interpreted("interpreted_kernels.py")


@needs_triton
@needs_vllm
@pytest.mark.slow
def test_an_engine_that_draws_by_the_kernel_keeps_what_engines_promise():
    """The same draws in every batch and after sleep, log-probs of stock transformers, cuts, forbidden tokens."""
    assert "passed" in run_interpreted("test_rollout_engines.py", "-k", "vllm and not hf")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"shared_prompt_decoding": True}, "it needs a GPU"),
        ({}, "shared_prompt_decoding=false"),
    ],
)
def test_prompts_are_not_shared_where_that_cannot_work(settings, reason):
    assert reason in find_obstacle(RolloutConfig(**settings), CPU)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM may fit here")
def test_a_vllm_that_does_not_fit_is_named():
    assert "vLLM" in find_obstacle_in_vllm()
