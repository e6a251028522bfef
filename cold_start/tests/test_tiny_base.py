"""The shipped tiny base: complete, small, made for the judge's format, and able to judge clips that it never saw."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from build_tiny import REWARD_CONFIG_NAME, TINY_BUDGET, judge_prompt_tokens
from evaluate_base import judge_cases, load_checkpoint, make_cases, summarise
from scored_sequence import REWARD_TOKEN, judge_problem
from toy_data import SEEN, ToyClips, balance_triples, make_texts
from toy_world.scene import ATTRIBUTES, DIMENSIONS, Request, Scene
from toy_world.texts import write_cot
from train_base import main, measure_perception

TINY_BASE = Path(__file__).resolve().parents[1] / "model" / "tiny_base"
MAX_PARAMETERS = 3_000_000
MAX_BYTES = 8_000_000
EXAMPLE_JSON = judge_problem("").splitlines()[-2]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY_BASE)


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="module")
def held_out_clips(processor):
    clips = ToyClips(processor, size=4, seed=0, held_out=True)
    return [clips[index] for index in range(4)]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_checkpoint_is_small():
    with safe_open(TINY_BASE / "model.safetensors", "pt") as weights:
        sizes = [int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys()]  # noqa: SIM118
    assert sum(sizes) <= MAX_PARAMETERS
    assert sum(path.stat().st_size for path in TINY_BASE.iterdir()) <= MAX_BYTES


def test_checkpoint_names_its_video_budget_and_special_tokens(tokenizer):
    assert json.loads((TINY_BASE / REWARD_CONFIG_NAME).read_text()) == {"video": asdict(TINY_BUDGET)}
    config, generation = AutoConfig.from_pretrained(TINY_BASE), GenerationConfig.from_pretrained(TINY_BASE)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert generation.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert not generation.do_sample


def test_chat_template_has_the_layout_of_qwen3_vl(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "video"}, {"type": "image"}]},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSee<|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "text", ["A red circle.", "cafe\u0301, na\u00efve", "\u6f22\u5b57 \U0001f3ac", "\t a  b\r\n\n\x00", EXAMPLE_JSON]
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_every_fixed_line_of_the_judge_prompt_is_one_token(tokenizer):
    problem = judge_problem("a red circle").replace("<video>", "")
    for line in judge_prompt_tokens():
        assert len(encode(tokenizer, line)) == 1
        assert line in problem
    assert len(encode(tokenizer, problem)) <= len(judge_prompt_tokens()) + 6


def test_the_answer_of_a_cot_is_made_of_ordinary_tokens(tokenizer):
    """Also when its scores happen to be those of the prompt's example."""
    asked = Scene("circle", "red", "left", "still", "city", "day", "flat")
    shown = Scene("circle", "red", "right", "still", "city", "day", "glowing")
    request = Request(asked, frozenset(DIMENSIONS) - {"camera"})
    cot = write_cot(request, shown, np.random.default_rng(0))
    assert EXAMPLE_JSON in cot
    line_ids = {encode(tokenizer, line)[0] for line in judge_prompt_tokens()}
    assert not line_ids & set(encode(tokenizer, cot))


def test_reward_token_fits_into_the_embedding(processor):
    tokenizer = AutoProcessor.from_pretrained(TINY_BASE).tokenizer
    assert REWARD_TOKEN not in tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True)])
    (reward_id,) = encode(tokenizer, REWARD_TOKEN)
    vocab_size = AutoConfig.from_pretrained(TINY_BASE).text_config.vocab_size
    assert reward_id < len(tokenizer) <= vocab_size
    assert vocab_size % 64 == 0


def test_greedy_judgements_of_held_out_clips_are_valid_and_mostly_right():
    model, builder, budget = load_checkpoint(TINY_BASE, "cpu")
    cases = make_cases(builder, budget, num_pairs=3, seed=3, held_out=True)
    metrics = summarise(judge_cases(model, builder, cases, batch_size=len(cases)))
    assert metrics["json_valid"] >= 1 - 1 / len(cases)
    assert np.mean([metrics["perception"][name]["right"] for name in ATTRIBUTES]) > 0.7


def test_shipped_weights_read_training_batches_as_training_left_them(processor, held_out_clips):
    """The training forward, its texts and its weights agree with the shipped model."""
    model = load_checkpoint(TINY_BASE, "cpu")[0]
    assert measure_perception(model, held_out_clips, processor.tokenizer, 4) > 0.8


def test_training_runs_from_nothing_and_writes_checkpoint_and_log(tmp_path):
    sizes = ["--steps", "2", "--batch-size", "2", "--pool-size", "3", "--held-out", "2", "--workers", "1"]
    main([*sizes, "--device", "cpu", "--save", str(tmp_path / "base")])
    log = json.loads((tmp_path / "base_train.json").read_text())
    assert (log["num_steps"], log["num_clips"], [point["step"] for point in log["curve"]]) == (2, 3, [2])
    assert 5 < log["curve"][0]["loss"] < 8  # about the logarithm of the vocabulary's size
    for name in ("tokenizer.json", REWARD_CONFIG_NAME, "chat_template.jinja"):
        assert (tmp_path / "base" / name).read_text() == (TINY_BASE / name).read_text(), name


def test_attributes_weigh_most_where_the_cot_first_names_them(processor, held_out_clips):
    texts = make_texts(processor.tokenizer, held_out_clips, np.arange(4), np.random.default_rng(1))
    for clip, ids, weights in zip(held_out_clips, texts.input_ids, texts.weights, strict=True):
        seen = processor.tokenizer.decode(ids[weights == SEEN].tolist())
        assert all(getattr(clip.scene, name) in seen for name in ATTRIBUTES)
        assert len(seen) < 100
        assert ids[weights > 0][-1] == processor.tokenizer.eos_token_id


def test_training_triples_leave_the_held_out_ones_out():
    triples = balance_triples()
    assert triples.sum() == pytest.approx(1)
    assert (triples == 0).sum() == 48
    for axis in range(3):  # pairs of values are about equally frequent
        pairs = triples.sum(axis=axis) * triples.sum(axis=axis).size
        assert 0.7 < pairs.min() <= pairs.max() < 1.4
