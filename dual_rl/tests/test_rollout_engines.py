"""Both rollout engines on the CPU, against stock transformers and against each other."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout_support import (
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
from verl.rollout.hf_engine import SeededDraws
from verl.types import ResponseKey, Sampling

torch.set_num_threads(1)
TOLERANCE = 1e-4  # log-probs in fp32


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
    made = {
        "hf": make_engine(folder, "hf", max_num_seqs=6),  # two prompts with their three responses at a time
        "vllm": make_engine(folder, "vllm", max_num_batched_tokens=MAX_MODEL_LEN),
    }
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(params=["hf", "vllm"])
def engine(request, engines):
    engines[request.param].load_weights(tiny_weights().items())
    return engines[request.param]


def largest_difference(rescorer, prompts, responses, *, temperature=1.0) -> float:
    return max(
        float((rescorer.log_probs(prompt, response, temperature=temperature) - response.log_probs).abs().max())
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    )


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_log_probs_are_those_of_stock_transformers(engine, prompts, rescorer, temperature):
    responses = engine.generate(prompts, replace(WRITING, temperature=temperature))
    assert largest_difference(rescorer, prompts, responses, temperature=temperature or 1.0) < TOLERANCE
    keys = [[response.key for response in group] for group in responses]
    assert keys == [[ResponseKey(*prompt.key, sample) for sample in range(3)] for prompt in prompts]
    for response in itertools.chain(*responses):
        assert (response.log_probs.shape, response.log_probs.dtype) == ((response.num_labels,), torch.float32)


def test_engines_agree_on_greedy_responses(engines, prompts):
    written = {}
    for name, engine in engines.items():
        engine.load_weights(tiny_weights().items())
        written[name] = [
            ids_of(engine.generate(prompts, replace(GREEDY, repetition_penalty=penalty))) for penalty in (1.0, 1.5)
        ]
    assert written["vllm"] == written["hf"]
    assert written["vllm"][0] != written["vllm"][1]
    for engine in engines.values():
        for best in ({"top_k": 1}, {"top_p": 1e-6}):
            assert ids_of(engine.generate(prompts, replace(WRITING, n=1, **best))) == written["hf"][0]


def test_draws_are_the_same_in_every_batch_and_after_sleep(engine, prompts):
    first = engine.generate(prompts, WRITING)
    engine.sleep()
    engine.wake()
    engine.load_weights(tiny_weights().items())
    again = engine.generate(prompts, WRITING)
    assert ids_of(again) == ids_of(first)
    for one, other in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert torch.equal(one.log_probs, other.log_probs)
    together = ids_of(first)
    assert ids_of(engine.generate(prompts[2:3], WRITING)) == together[2:3]
    assert ids_of(engine.generate(prompts[::-1], WRITING)) == together[::-1]
    assert sum(prompt.input_ids.numel() for prompt in 2 * prompts) > MAX_MODEL_LEN  # of one batch in vLLM
    assert ids_of(engine.generate(2 * prompts, replace(WRITING, n=1))) == 2 * [group[:1] for group in together]


def test_forbidden_tokens_are_never_drawn_and_have_no_probability(engine, prompts, rescorer):
    output = tiny_weights()["lm_head.weight"]
    engine.load_weights({**tiny_weights(), "lm_head.weight": torch.zeros_like(output)}.items())
    num_allowed = len(output) - len(rescorer.forbidden)
    drawn = Counter()
    for response in itertools.chain(*engine.generate(prompts, replace(WRITING, n=8))):
        drawn.update(response.cot_ids)
        torch.testing.assert_close(response.log_probs, torch.full_like(response.log_probs, num_allowed).log().neg())
    assert drawn.total() > 400
    assert not set(drawn) & set(rescorer.forbidden)
    wanted = output.clone()
    wanted[rescorer.forbidden] = 1e4 * output[:1]
    engine.load_weights({**tiny_weights(), "lm_head.weight": wanted}.items())
    for sampling in (WRITING, GREEDY):
        ids = itertools.chain(*itertools.chain(*ids_of(engine.generate(prompts, sampling))))
        assert not set(ids) & set(rescorer.forbidden)


def test_responses_end_at_eos_or_are_cut(engine, prompts, rescorer):
    (finished,) = engine.generate(prompts[:1], replace(GREEDY, max_tokens=300))[0]
    assert finished.is_finished
    assert rescorer.eos_token_id not in finished.cot_ids
    length = len(finished.cot_ids)
    assert finished.num_labels == length + 1
    for max_tokens, is_finished in ((length, False), (length + 1, True), (5, False)):
        (response,) = engine.generate(prompts[:1], replace(GREEDY, max_tokens=max_tokens))[0]
        assert response.is_finished is is_finished
        assert response.cot_ids == finished.cot_ids[:max_tokens]
        assert response.num_labels == min(max_tokens, length + 1)
    with pytest.raises(ValueError, match=r"pair 0, video A: a prompt of \d+ tokens .* Raise data.max_prompt_length"):
        engine.generate(prompts, replace(WRITING, max_tokens=MAX_MODEL_LEN))


def test_responses_follow_the_weights_that_were_handed_over(engine, folder, prompts):
    """Also where only the vision tower changed: features of the old weights must not be reused."""
    before = ids_of(engine.generate(prompts, GREEDY))
    changed = changed_weights()
    vision = {name: changed[name] if ".visual." in name else tensor for name, tensor in tiny_weights().items()}
    for weights in (vision, changed):
        engine.load_weights(weights.items())
        responses = engine.generate(prompts, GREEDY)
        assert largest_difference(Rescorer(folder, weights), prompts, responses) < TOLERANCE
    assert ids_of(responses) != before
    halves = {name: tensor.bfloat16() for name, tensor in tiny_weights().items()}  # as they were stored
    engine.load_weights(halves.items())
    for tensor in halves.values():  # the trainer goes on changing its own
        tensor.zero_()
    assert ids_of(engine.generate(prompts, GREEDY)) == before


def test_the_process_is_left_as_it_was(engine, prompts):
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    engine.generate(prompts, WRITING)
    assert draw() == expected


def test_another_prompt_in_vllm_is_an_error(engines, prompts):
    engine = engines["vllm"]
    changed = prompts[1].input_ids.clone()
    changed[7] += 1
    for ids, index in ((changed, 7), (prompts[1].input_ids[:-2], prompts[1].input_ids.numel() - 2)):
        with pytest.raises(ValueError, match=rf"pair 0, video B: vLLM reads a prompt of .*\b{index}\b"):
            engine.generate([prompts[0], replace(prompts[1], input_ids=ids)], GREEDY)


def test_prompts_that_keep_the_marks_around_a_video_are_written(engines, prompts, rescorer):
    """What vLLM 0.24 needs with transformers 5.17: here by prompts with one more vision start and end."""
    engine = engines["vllm"]
    engine.load_weights(tiny_weights().items())
    ids, config = prompts[0].input_ids, rescorer.model.config
    start = int((ids == config.vision_start_token_id).nonzero()[0])
    end = int((ids == config.vision_end_token_id).nonzero()[-1])
    kept = torch.cat([ids[:start], ids[start : start + 1], ids[start : end + 1], ids[end : end + 1], ids[end + 1 :]])
    prompt = replace(prompts[0], input_ids=kept)
    engine.form.wraps_video = None  # as before the first prompt
    try:
        responses = engine.generate([prompt], WRITING)
    finally:
        engine.form.wraps_video = None
    assert largest_difference(rescorer, [prompt], responses) < TOLERANCE


def test_hf_draws_follow_the_distribution():
    """4000 rows with the same logits: the share of each token against softmax(logits / T) over the allowed ones."""
    sampling = Sampling(n=4000, temperature=0.5, top_p=1.0, top_k=-1, max_tokens=1, seed=0)
    logits = torch.tensor([0.0, 0.5, 1.0, 3.0])
    keys = [ResponseKey(0, "A", sample) for sample in range(4000)]
    draws = SeededDraws(sampling, keys, forbidden_token_ids=torch.tensor([3]))
    drawn = draws(torch.zeros(4000, 1, dtype=torch.long), logits.expand(4000, -1)).argmax(dim=-1)
    expected = torch.softmax(logits[:3] / 0.5, dim=-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[3] == 0
    torch.testing.assert_close(shares[:3], expected, atol=0.03, rtol=0)  # 4 standard deviations
    torch.testing.assert_close(draws.log_probs[0], expected.log()[drawn])


@pytest.mark.slow
def test_both_engines_follow_the_weights_of_experts(engines, tmp_path):
    """Twice handed over, with sleep in between: log-probs are those of stock transformers."""
    engines["vllm"].close()  # its process groups are those of a dense model; it is not used again
    folder = write_engine_folder(tmp_path, has_experts=True)
    prompts, written = make_prompts(folder), []
    tiny, changed = tiny_weights(has_experts=True), changed_weights(has_experts=True)
    rescorers = [Rescorer(folder, weights) for weights in (tiny, changed)]
    for name in ("hf", "vllm"):
        engine = make_engine(folder, name, max_num_batched_tokens=MAX_MODEL_LEN)
        for weights, rescorer in zip((tiny, changed), rescorers, strict=True):
            engine.load_weights(weights.items())
            assert largest_difference(rescorer, prompts, engine.generate(prompts, WRITING)) < TOLERANCE
            written.append(ids_of(engine.generate(prompts, GREEDY)))
            engine.sleep()
            engine.wake()
        engine.close()
    assert written[:2] == written[2:]
    assert written[0] != written[1]
