"""The shipped tiny base: complete, small, made for the judge's format, and able to judge clips that it never saw."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from build_tiny import REWARD_CONFIG_NAME, TINY_BUDGET, judge_prompt_tokens
from evaluate_base import judge_cases, load_checkpoint, make_cases
from fast_forward import compute_batch_positions, compute_label_logits, use_equal_segments
from judgement_metrics import read_attributes
from scored_sequence import REWARD_TOKEN, compute_mrope_positions, judge_problem
from toy_batches import ATTRIBUTE_KINDS, Batch, ClipPool, balance_triples, make_clips, make_texts, to_text_batch
from toy_world.judge import parse_scores, write_cot
from toy_world.scene import ATTRIBUTES, DIMENSIONS, Request, Scene

TINY_BASE = Path(__file__).resolve().parents[1] / "model" / "tiny_base"
MAX_PARAMETERS = 3_000_000
MAX_BYTES = 8_000_000
NUM_PAIRS = 3
EXAMPLE_JSON = judge_problem("").splitlines()[-2]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY_BASE)


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(TINY_BASE, "cpu")


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
        {"role": "assistant", "content": [{"type": "text", "text": "Fine.\n"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "\nAnd this?"}]},
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSee<|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nFine.\n<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>\nAnd this?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(messages[:1], tokenize=False).endswith("Be brief.<|im_end|>\n")


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


def test_greedy_judgements_of_held_out_clips_are_valid_and_mostly_right(loaded):
    model, builder, budget = loaded
    cases = make_cases(builder, budget, num_pairs=NUM_PAIRS, seed=3, held_out=True)
    judgements = judge_cases(model, builder, cases, batch_size=len(cases))
    assert sum(parse_scores(judgement.cot) is not None for judgement in judgements) >= len(cases) - 1
    right = [read_attributes(j.cot)[name] == getattr(j.scene, name) for j in judgements for name in ATTRIBUTES]
    assert np.mean(right) > 0.7


def test_training_forward_equals_the_stock_forward(processor):
    model = load_checkpoint(TINY_BASE, "cpu")[0]
    clips = make_clips(processor, seed=0, count=8, held_out=False)
    pool = ClipPool(torch.device("cpu"), capacity=len(clips))
    pool.add(clips)
    grid = max(pool.items, key=lambda grid: len(pool.items[grid]))
    items = pool.items[grid]
    text = to_text_batch(*make_texts(processor, seed=0, clips=items), torch.device("cpu"))
    batch = Batch(text, pool.pixel_values(grid, np.arange(len(items))), grid)
    is_video = text.input_ids == model.config.video_token_id
    with torch.no_grad():
        expected = model(
            input_ids=text.input_ids,
            pixel_values_videos=batch.pixel_values,
            video_grid_thw=torch.tensor([grid] * len(items)),
            mm_token_type_ids=2 * is_video.int(),
        ).logits[text.rows, text.columns - 1]
        use_equal_segments(model)
        torch.testing.assert_close(compute_label_logits(model, batch), expected, atol=1e-4, rtol=1e-4)
    positions = compute_batch_positions(is_video, grid, merge_size=2)
    for row, ids in enumerate(text.input_ids):
        reference = compute_mrope_positions(
            ids, video_token_id=model.config.video_token_id, grid_thw=grid, merge_size=2
        )
        assert torch.equal(positions[:, row], reference)


def test_attributes_are_labelled_where_the_cot_first_names_them(processor):
    clips = make_clips(processor, seed=1, count=1, held_out=True)
    items = [(clip.scene, clip.request, clip.prefix_ids) for clip in clips]
    input_ids, kinds = make_texts(processor, seed=1, clips=items)
    for name in ("color", "shape", "place", "light", "style"):
        labelled = processor.tokenizer.decode(input_ids[0][kinds[0] == ATTRIBUTE_KINDS[name]].tolist())
        assert labelled.strip() == getattr(clips[0].scene, name)


def test_training_triples_leave_the_held_out_ones_out():
    triples = balance_triples()
    assert triples.sum() == pytest.approx(1)
    assert (triples == 0).sum() == 48
    for axis in range(3):  # pairs of values are about equally frequent
        pairs = triples.sum(axis=axis) * triples.sum(axis=axis).size
        assert 0.7 < pairs.min() <= pairs.max() < 1.4
