"""vLLM on a GPU: what transformers writes, also after sleep, with new weights in memory that held other things."""

import importlib.util

import pytest
import torch

from rollout_support import (
    GREEDY,
    WRITING,
    Rescorer,
    changed_weights,
    ids_of,
    make_engine,
    make_prompts,
    tiny_weights,
    write_engine_folder,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_engine_folder(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def prompts(folder):
    return make_prompts(folder)


@pytest.fixture(scope="module")
def engine(folder):
    made = make_engine(folder, "vllm", CUDA, gpu_memory_utilization=0.1, max_num_seqs=16, enforce_eager=True)
    yield made
    made.close()


def mean_difference(rescorer, prompts, responses) -> float:
    """bf16 against fp32, so single tokens may differ by a few hundredths."""
    differences = [
        (rescorer.log_probs(prompt, response) - response.log_probs).abs()
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]
    return float(torch.cat(differences).mean())


def fill_free_memory() -> None:
    """Leave large numbers in whatever memory the engine gave back."""
    free, _ = torch.cuda.mem_get_info()
    block = torch.full((int(free * 0.9) // 2,), 1e4, dtype=torch.bfloat16, device=CUDA)
    torch.cuda.synchronize()
    del block
    torch.cuda.empty_cache()


def test_log_probs_are_those_of_stock_transformers(engine, folder, prompts):
    engine.load_weights(tiny_weights().items())
    responses = engine.generate(prompts, WRITING)
    assert mean_difference(Rescorer(folder, tiny_weights()), prompts, responses) < 0.03


def test_nothing_old_is_left_after_sleep(engine, folder, prompts):
    engine.load_weights(tiny_weights().items())
    before = engine.generate(prompts, GREEDY)
    free_before = torch.cuda.mem_get_info()[0]
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] > free_before
    fill_free_memory()
    engine.wake()
    engine.load_weights(tiny_weights().items())
    after = engine.generate(prompts, GREEDY)
    assert ids_of(after) == ids_of(before)
    engine.load_weights(changed_weights().items())
    responses = engine.generate(prompts, WRITING)
    assert mean_difference(Rescorer(folder, changed_weights()), prompts, responses) < 0.03
