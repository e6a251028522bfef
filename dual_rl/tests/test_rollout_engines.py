"""Both rollout engines on the CPU, against stock transformers and against each other."""

import dataclasses
import importlib.util
import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from rollout_support import (
    CPU,
    GREEDY,
    MAX_MODEL_LEN,
    WRITING,
    Rescorer,
    changed_weights,
    ids_of,
    make_engine,
    make_prompts,
    tiny_weights,
    write_engine_folder,
)
from verl.rollout.engine import response_seed, video_seed
from verl.rollout.hf_engine import SeededDraws
from verl.types import ResponseKey, Sampling

torch.set_num_threads(1)
TOLERANCE = 1e-4  # log-probs in fp32
HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_engine_folder(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def prompts(folder):
    return make_prompts(folder)


@pytest.fixture(scope="module")
def rescorer(folder):
    return Rescorer(folder, tiny_weights())


@pytest.fixture(scope="module")
def engines(folder):
    """Each engine once: starting vLLM takes most of the time of these tests."""
    made = {"hf": make_engine(folder, "hf")}
    if HAS_VLLM:
        made["vllm"] = make_engine(folder, "vllm", max_num_batched_tokens=MAX_MODEL_LEN)
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(params=["hf", pytest.param("vllm", marks=needs_vllm)])
def engine(request, engines):
    engines[request.param].load_weights(tiny_weights().items())
    return engines[request.param]


def largest_difference(rescorer, prompts, responses, *, temperature=1.0) -> float:
    return max(
        float((rescorer.log_probs(prompt, response, temperature=temperature) - response.log_probs).abs().max())
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_stock_transformers(engine, prompts, rescorer, temperature):
    sampling = dataclasses.replace(WRITING, temperature=temperature)
    responses = engine.generate(prompts, sampling)
    difference = largest_difference(rescorer, prompts, responses, temperature=temperature or 1.0)
    assert difference < TOLERANCE


def test_responses_come_in_order_of_prompts_and_samples(engine, prompts):
    responses = engine.generate(prompts, WRITING)
    keys = [[response.key for response in group] for group in responses]
    assert keys == [[ResponseKey(*prompt.key, sample) for sample in range(3)] for prompt in prompts]
    for group in responses:
        for response in group:
            assert response.log_probs.shape == (response.num_labels,)
            assert response.log_probs.dtype == torch.float32


@needs_vllm
def test_engines_agree_on_greedy_responses(engines, prompts):
    written = {}
    for name, engine in engines.items():
        engine.load_weights(tiny_weights().items())
        written[name] = {
            penalty: ids_of(engine.generate(prompts, dataclasses.replace(GREEDY, repetition_penalty=penalty)))
            for penalty in (1.0, 1.5)
        }
    assert written["vllm"] == written["hf"]
    assert written["vllm"][1.0] != written["vllm"][1.5]


def test_draws_are_the_same_again(engine, prompts):
    first = engine.generate(prompts, WRITING)
    engine.sleep()
    engine.wake()
    engine.load_weights(tiny_weights().items())
    again = engine.generate(prompts, WRITING)
    assert ids_of(again) == ids_of(first)
    for one, other in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert torch.equal(one.log_probs, other.log_probs)


def test_draws_do_not_depend_on_the_batch(engine, prompts):
    together = ids_of(engine.generate(prompts, WRITING))
    assert ids_of(engine.generate(prompts[2:3], WRITING)) == together[2:3]
    assert ids_of(engine.generate(prompts[::-1], WRITING)) == together[::-1]
    fewer = dataclasses.replace(WRITING, n=1)
    assert ids_of(engine.generate(prompts, fewer)) == [group[:1] for group in together]


def test_more_prompts_than_one_batch_of_tokens_draw_the_same(engine, prompts):
    assert sum(prompt.input_ids.numel() for prompt in 2 * prompts) > MAX_MODEL_LEN
    sampling = dataclasses.replace(WRITING, n=1)
    alone = ids_of(engine.generate(prompts, sampling))
    assert ids_of(engine.generate(2 * prompts, sampling)) == 2 * alone


def test_samples_and_seeds_draw_differently(engine, prompts):
    sampling = dataclasses.replace(WRITING, temperature=2.0)
    first = ids_of(engine.generate(prompts[:1], sampling))[0]
    other = ids_of(engine.generate(prompts[:1], dataclasses.replace(sampling, seed=6)))[0]
    assert len({*first, *other}) == 6


def test_greedy_samples_are_copies(engine, prompts):
    (group,) = engine.generate(prompts[:1], dataclasses.replace(GREEDY, n=2))
    assert group[0].cot_ids == group[1].cot_ids
    assert [response.key.sample for response in group] == [0, 1]


def test_the_single_best_token_is_the_greedy_one(engine, prompts):
    top_1 = engine.generate(prompts, dataclasses.replace(WRITING, n=1, top_k=1))
    nucleus = engine.generate(prompts, dataclasses.replace(WRITING, n=1, top_p=1e-6))
    assert ids_of(top_1) == ids_of(nucleus) == ids_of(engine.generate(prompts, GREEDY))
    assert float(top_1[0][0].log_probs.abs().max()) == 0.0  # of the distribution after the cut


def test_forbidden_tokens_are_never_drawn_and_have_no_probability(engine, prompts, rescorer):
    uniform = {**tiny_weights(), "lm_head.weight": torch.zeros_like(tiny_weights()["lm_head.weight"])}
    engine.load_weights(uniform.items())
    num_allowed = uniform["lm_head.weight"].shape[0] - len(rescorer.forbidden)
    drawn = Counter()
    for group in engine.generate(prompts, dataclasses.replace(WRITING, n=8)):
        for response in group:
            drawn.update(response.cot_ids)
            torch.testing.assert_close(
                response.log_probs, torch.full_like(response.log_probs, num_allowed).log().neg()
            )
    assert drawn.total() > 400
    assert not set(drawn) & set(rescorer.forbidden)


def test_forbidden_tokens_are_out_even_when_the_model_wants_nothing_else(engine, prompts, rescorer):
    weights = {**tiny_weights(), "lm_head.weight": tiny_weights()["lm_head.weight"].clone()}
    weights["lm_head.weight"][rescorer.forbidden] = 1e4 * weights["lm_head.weight"][:1]
    engine.load_weights(weights.items())
    for sampling in (WRITING, GREEDY):
        ids = {token for group in ids_of(engine.generate(prompts, sampling)) for row in group for token in row}
        assert not ids & set(rescorer.forbidden)


def test_responses_end_at_eos_or_are_cut(engine, prompts, rescorer):
    (finished,) = engine.generate(prompts[:1], dataclasses.replace(GREEDY, max_tokens=300))[0]
    assert finished.is_finished
    assert rescorer.eos_token_id not in finished.cot_ids
    assert finished.num_labels == len(finished.cot_ids) + 1
    length = len(finished.cot_ids)
    for max_tokens, is_finished in ((length, False), (length + 1, True), (5, False)):
        (response,) = engine.generate(prompts[:1], dataclasses.replace(GREEDY, max_tokens=max_tokens))[0]
        assert response.is_finished is is_finished
        assert response.cot_ids == finished.cot_ids[:max_tokens]
        assert response.num_labels == min(max_tokens, length + 1)


def test_new_weights_change_what_is_written(engine, folder, prompts):
    before = engine.generate(prompts, GREEDY)
    engine.load_weights(changed_weights().items())
    after = engine.generate(prompts, GREEDY)
    assert ids_of(after) != ids_of(before)
    assert largest_difference(Rescorer(folder, changed_weights()), prompts, after) < TOLERANCE
    engine.load_weights(tiny_weights().items())
    assert ids_of(engine.generate(prompts, GREEDY)) == ids_of(before)


def test_new_vision_weights_change_what_is_written(engine, folder, prompts):
    """The same videos again: features computed with the old weights must not be reused."""
    engine.generate(prompts, WRITING)
    changed = changed_weights()
    mixed = {name: changed[name] if ".visual." in name else tensor for name, tensor in tiny_weights().items()}
    engine.load_weights(mixed.items())
    responses = engine.generate(prompts, WRITING)
    assert largest_difference(Rescorer(folder, mixed), prompts, responses) < TOLERANCE


def test_weights_are_copied(engine, prompts):
    """The trainer goes on changing its own."""
    before = ids_of(engine.generate(prompts, GREEDY))
    weights = {name: tensor.clone() for name, tensor in tiny_weights().items()}
    engine.load_weights(weights.items())
    for tensor in weights.values():
        tensor.zero_()
    assert ids_of(engine.generate(prompts, GREEDY)) == before


def test_weights_in_half_precision_are_taken(engine, prompts):
    engine.load_weights((name, tensor.bfloat16()) for name, tensor in tiny_weights().items())  # as they were stored
    halves = ids_of(engine.generate(prompts, GREEDY))
    engine.load_weights(tiny_weights().items())
    assert halves == ids_of(engine.generate(prompts, GREEDY))


def test_too_long_requests_are_refused(engine, prompts):
    with pytest.raises(ValueError, match=r"pair 0, video A: a prompt of \d+ tokens .* raise data.max_prompt_length"):
        engine.generate(prompts, dataclasses.replace(WRITING, max_tokens=MAX_MODEL_LEN))


def test_the_process_is_left_as_it_was(engine, prompts):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    engine.generate(prompts, WRITING)
    assert draw() == expected
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@needs_vllm
def test_another_prompt_in_vllm_is_an_error(engines, prompts):
    engine = engines["vllm"]
    changed = prompts[1].input_ids.clone()
    changed[7] += 1
    with pytest.raises(ValueError, match=r"pair 0, video B: vLLM reads a prompt of .* different from token 7 on"):
        engine.generate([prompts[0], dataclasses.replace(prompts[1], input_ids=changed)], GREEDY)
    shorter = dataclasses.replace(prompts[1], input_ids=prompts[1].input_ids[:-2])
    with pytest.raises(ValueError, match=f"different from token {len(shorter.input_ids)} on"):
        engine.generate([shorter], GREEDY)


@needs_vllm
def test_prompts_that_keep_the_marks_around_a_video_are_written(engines, prompts, rescorer):
    """What vLLM 0.24 needs with transformers 5.17: here by prompts with one more vision start and end."""
    engine = engines["vllm"]
    engine.load_weights(tiny_weights().items())
    video_start = int((prompts[0].input_ids == rescorer.model.config.vision_start_token_id).nonzero()[0])
    video_end = int((prompts[0].input_ids == rescorer.model.config.vision_end_token_id).nonzero()[-1])
    ids = prompts[0].input_ids
    start, end = ids[video_start : video_start + 1], ids[video_end : video_end + 1]
    kept = torch.cat([ids[:video_start], start, ids[video_start : video_end + 1], end, ids[video_end + 1 :]])
    prompt = dataclasses.replace(prompts[0], input_ids=kept)
    engine.form.wraps_video = None  # as before the first prompt
    try:
        responses = engine.generate([prompt], WRITING)
    finally:
        engine.form.wraps_video = None
    assert largest_difference(rescorer, [prompt], responses) < TOLERANCE


def test_hf_has_no_tensor_parallelism(folder):
    with pytest.raises(ValueError, match="set tensor_parallel_size to 1"):
        make_engine(folder, "hf", tensor_parallel_size=2)


def test_hf_batches_do_not_change_the_draws(folder, prompts, engines):
    engines["hf"].load_weights(tiny_weights().items())
    small = make_engine(folder, "hf", max_num_seqs=4)  # one prompt with its three responses at a time
    small.load_weights(tiny_weights().items())
    assert ids_of(small.generate(prompts, WRITING)) == ids_of(engines["hf"].generate(prompts, WRITING))


def test_hf_says_which_weights_are_missing(folder):
    engine = make_engine(folder, "hf")
    weights = dict(tiny_weights())
    del weights["model.visual.patch_embed.proj.weight"]
    with pytest.raises(AssertionError, match=r"no weights for model\.visual\.patch_embed"):
        engine.load_weights(weights.items())


def test_seeds_are_distinct_and_reproducible():
    sampling = dataclasses.replace(WRITING, seed=7)
    keys = [ResponseKey(pair, side, sample) for pair in range(200) for side in "AB" for sample in range(8)]
    seeds = [response_seed(sampling, key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [response_seed(sampling, key) for key in keys]
    assert seeds[0] == video_seed(sampling, keys[0].video)
    other = {response_seed(dataclasses.replace(WRITING, seed=8), key) for key in keys}
    assert not other & set(seeds)


def test_hf_draws_follow_the_distribution():
    """4000 rows with the same logits: the share of each token against softmax(logits / T) over the allowed ones."""
    sampling = Sampling(n=4000, temperature=0.5, top_p=1.0, top_k=-1, max_tokens=1, seed=0)
    logits = torch.tensor([0.0, 0.5, 1.0, 3.0])
    keys = [ResponseKey(0, "A", sample) for sample in range(4000)]
    draws = SeededDraws(sampling, keys, forbidden_token_ids=torch.tensor([3], device=CPU))
    drawn = draws(torch.zeros(4000, 1, dtype=torch.long), logits.expand(4000, -1)).argmax(dim=-1)
    expected = torch.softmax(logits[:3] / 0.5, dim=-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[3] == 0
    torch.testing.assert_close(shares[:3], expected, atol=0.03, rtol=0)  # 4 standard deviations
    torch.testing.assert_close(draws.log_probs[0], expected.log()[drawn])
