"""vLLM on a GPU: what transformers writes, also after sleep, with new weights in memory that held other things.

A process can have one engine that sleeps, so the numbers' format is one for all: `ROLLOUT_FORMAT=fp8 pytest -m gpu`;
`ROLLOUT_EXPERTS=1` takes a mixture of experts.
"""

import dataclasses
import importlib.util
import os
from functools import partial

import pytest
import torch

import rollout_support
from rollout_support import (
    GREEDY,
    WRITING,
    Rescorer,
    ids_of,
    make_engine,
    make_prompts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
CUDA = torch.device("cuda", 0)
KIND = {"has_experts": "ROLLOUT_EXPERTS" in os.environ}
tiny_weights, changed_weights, write_engine_folder = (
    partial(getattr(rollout_support, name), **KIND)
    for name in ("tiny_weights", "changed_weights", "write_engine_folder")
)
FORMATS = {"bf16": {}, "fp8": {"quantization": "fp8"}, "fp8_cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"}}
FORMAT = os.environ.get("ROLLOUT_FORMAT", "bf16")
BOUND = 0.03 if FORMAT == "bf16" else 0.1
"""Of mean_difference."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_engine_folder(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def prompts(folder):
    return make_prompts(folder)


@pytest.fixture(scope="module")
def engine(folder):
    """It decodes in CUDA graphs."""
    settings = {"gpu_memory_utilization": 0.1, "max_num_seqs": 16, **FORMATS[FORMAT]}
    made = make_engine(folder, "vllm", CUDA, **settings, max_model_len=1024)
    yield made
    made.close()


def mean_difference(rescorer, prompts, responses) -> float:
    """Low precision against fp32, so single tokens may differ by a few hundredths."""
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
    assert mean_difference(Rescorer(folder, tiny_weights()), prompts, responses) < BOUND


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
    to_old = mean_difference(Rescorer(folder, tiny_weights()), prompts, responses)
    assert mean_difference(Rescorer(folder, changed_weights()), prompts, responses) < BOUND * to_old


def test_grouped_responses_are_as_close_to_fp32_as_single_ones(engine, folder, monkeypatch):
    """A response alone is stock attention; beside others of its prompt it is merged from two parts."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("prompts are shared on Hopper cards only")
    from verl.rollout.shared_prompt.kernels import Grouping

    group, num_grouped = Grouping.group, []

    def watched(*arguments):
        batch = group(*arguments)
        num_grouped.append(int((batch.grouped >= 0).sum()))
        return batch

    monkeypatch.setattr(Grouping, "group", watched)
    engine.load_weights(tiny_weights().items())
    prompts = make_prompts(folder, repetitions=60)
    sampling = dataclasses.replace(WRITING, max_tokens=64)
    rescorer, differences = Rescorer(folder, tiny_weights()), {}
    for n in (1, 4):
        responses = engine.generate(prompts, dataclasses.replace(sampling, n=n))
        differences[n] = mean_difference(rescorer, prompts, responses)
        assert (max(num_grouped) > 0) == (n > 1)
    assert differences[4] < max(1.5 * differences[1], 0.005)


def test_draws_do_not_depend_on_the_batch(engine, prompts):
    """bf16 may turn a draw where two tokens are all but equal, so not all responses have to be the same."""
    engine.load_weights(tiny_weights().items())
    sampling = dataclasses.replace(WRITING, n=8)
    together = ids_of(engine.generate(prompts, sampling))
    alone = [ids_of(engine.generate([prompt], sampling))[0] for prompt in prompts]
    pairs = [
        (one, other)
        for group, others in zip(together, alone, strict=True)
        for one, other in zip(group, others, strict=True)
    ]
    assert sum(one == other for one, other in pairs) > 0.8 * len(pairs)


def chi_square_of(counts: torch.Tensor, logits: torch.Tensor) -> tuple[float, int]:
    """Of draws counted by token against softmax(logits), and its degrees of freedom; rare tokens count as one."""
    counts = counts.double()
    expected = counts.sum() * logits.double().softmax(dim=0)
    assert counts[expected == 0].sum() == 0, "tokens without probability were drawn"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def test_draws_follow_softmax():
    """Half a million draws from a vocabulary of 151,936."""
    from verl.rollout.draw_kernel import draw_tokens

    vocab, batch = 151_936, 4096
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(0)).to(CUDA)
    logits[::100] = -torch.inf
    counts, table = torch.zeros(vocab, dtype=torch.int64, device=CUDA), torch.zeros(1, 1, device=CUDA)
    for position in range(128):
        seeds = torch.arange(batch, device=CUDA)
        rows = torch.stack([seeds, torch.full_like(seeds, position), torch.full_like(seeds, -1)])
        counts += torch.bincount(draw_tokens(logits.expand(batch, -1), rows, table), minlength=vocab)
    chi_square, freedom = chi_square_of(counts, logits)
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
