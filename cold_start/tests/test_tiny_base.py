"""The shipped tiny base: made for the judge's format, and able to judge clips that it never saw."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from scored_sequence import judge_problem
from stage1_support import TINY_BASE
from toy_data import SEEN, ToyClips, make_texts
from toy_world.scene import ATTRIBUTES, DIMENSIONS, Request, Scene
from toy_world.texts import write_cot
from train_base import evaluate, main, measure_perception

EXAMPLE_JSON = judge_problem("").splitlines()[-2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoProcessor.from_pretrained(TINY_BASE).tokenizer


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_fixed_lines_of_the_judge_prompt_are_tokens_and_answers_are_ordinary_text(tokenizer):
    ids = encode(tokenizer, judge_problem("a red circle").replace("<video>", ""))
    assert len(ids) <= 16
    lines = {i for i in ids if len(tokenizer.decode([i])) > 20}
    assert len(lines) >= 9
    asked = Scene("circle", "red", "left", "still", "city", "day", "flat")
    shown = Scene("circle", "red", "right", "still", "city", "day", "glowing")
    cot = write_cot(Request(asked, frozenset(DIMENSIONS) - {"camera"}), shown, np.random.default_rng(0))
    assert EXAMPLE_JSON in cot  # its scores happen to be those of the prompt's example
    assert not lines & set(encode(tokenizer, cot))


def test_greedy_judgements_of_held_out_clips_are_valid_and_mostly_right():
    found = evaluate(TINY_BASE, num_pairs=4)
    assert found["json_valid"] >= 7 / 8
    assert found["sub_scores_right"] > 0.7


def test_shipped_weights_read_training_batches_as_training_left_them():
    """The training forward, its texts and its weights agree with the shipped model."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(TINY_BASE, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    clips = [ToyClips(processor, size=4, seed=0, held_out=True)[index] for index in range(4)]
    assert measure_perception(model, clips, processor.tokenizer, 4) > 0.8
    texts = make_texts(processor.tokenizer, clips, np.arange(4), np.random.default_rng(1))
    for clip, ids, weights in zip(clips, texts.input_ids, texts.weights, strict=True):
        seen = processor.tokenizer.decode(ids[weights == SEEN].tolist())
        assert all(getattr(clip.scene, name) in seen for name in ATTRIBUTES)
        assert ids[weights > 0][-1] == processor.tokenizer.eos_token_id


def test_training_runs_from_nothing_and_writes_checkpoint_and_log(tmp_path):
    sizes = ["--steps", "2", "--batch-size", "2", "--pool-size", "2", "--workers", "1"]
    main([*sizes, "--device", "cpu", "--save", str(tmp_path / "base")])
    log = json.loads((tmp_path / "base_train.json").read_text())
    assert (log["num_steps"], log["num_clips"], [point["step"] for point in log["curve"]]) == (2, 2, [2])
    assert 5 < log["curve"][0]["loss"] < 8  # about the logarithm of the vocabulary's size
    for name in ("tokenizer.json", "reward_config.json", "chat_template.jinja"):
        assert (tmp_path / "base" / name).read_text() == (TINY_BASE / name).read_text(), name
