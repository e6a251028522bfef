"""The tiny base before training: tokenizer, processor and random weights.

Architecture, chat template, processor and generation are read from `tiny_base/`. The tokenizer, a byte-level BPE, is
trained on texts of the toy world, whose words are one token each. Every fixed line of the judge prompt, with its
newline, is one added token: ten tokens instead of about 250. The last four lines (the sentence before the example
answer, and the example) are one token together, so that the tags and the JSON of an answer remain ordinary tokens.
Like Qwen3-VL's, the embedding table is padded to a multiple of 64 rows and has spare ones for `<Reward>`.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from scored_sequence import VIDEO_PLACEHOLDER, judge_problem
from toy_world.scene import sample_clip_scene, sample_request
from toy_world.texts import write_cot, write_prompt
from vision_process import VideoBudget

TINY_BASE = Path(__file__).resolve().parent / "tiny_base"
TINY_BUDGET = VideoBudget(fps=2.0, min_frames=4, max_frames=16, min_pixels=64 * 64, max_pixels=112 * 112)
REWARD_CONFIG_NAME = "reward_config.json"
PAD_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_end|>"
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
NUM_BPE_TOKENS = 720
EMBEDDING_MULTIPLE, MIN_SPARE_ROWS = 64, 8
# Qwen's split into words: contractions, words with one leading character, single digits, punctuation, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS_SIZE, CORPUS_SEED = 3000, 0
MAX_TIMESTAMP = 8  # seconds, in the tokenizer's corpus
EXAMPLE_LINES = 4  # the judge prompt's last lines, from "Think first" to "</answer>": one token


def judge_prompt_tokens() -> tuple[str, ...]:
    """The fixed lines of the judge prompt, each with its newline; the last four are joined. Each becomes one token."""
    slot = "{prompt}"
    before, after = judge_problem(slot).replace(VIDEO_PLACEHOLDER, "").split(slot)
    lines = [*before.splitlines(keepends=True), *after.splitlines(keepends=True)]
    joined = [*lines[:-EXAMPLE_LINES], "".join(lines[-EXAMPLE_LINES:])]
    return tuple(line for line in joined if line.strip())


def iterate_corpus() -> Iterator[str]:
    """Prompts, chains of thought and timestamps of the toy world, for the tokenizer."""
    rng = np.random.default_rng(CORPUS_SEED)
    for _ in range(CORPUS_SIZE):
        request = sample_request(rng, held_out=False)
        yield write_prompt(request, rng)
        yield write_cot(request, sample_clip_scene(request, rng, held_out=False), rng)
        yield f"<{rng.uniform(0, MAX_TIMESTAMP):.1f} seconds>"


def build_processor() -> Qwen3VLProcessor:
    """The shipped processor with a new tokenizer: BPE, Qwen3-VL's special tokens and the judge prompt's lines."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=NUM_BPE_TOKENS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(iterate_corpus(), trainer)
    special = (PAD_TOKEN, "<|im_start|>", EOS_TOKEN, *VISION_TOKENS.values())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(line, special=False, normalized=False) for line in judge_prompt_tokens()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS.values()],
        model_max_length=AutoConfig.from_pretrained(TINY_BASE).text_config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    shipped = AutoProcessor.from_pretrained(TINY_BASE)
    return Qwen3VLProcessor(
        shipped.image_processor, tokenizer, shipped.video_processor, chat_template=shipped.chat_template
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3VLForConditionalGeneration:
    """The model with seeded random weights in fp32."""
    config = AutoConfig.from_pretrained(TINY_BASE, dtype=torch.float32)
    for name, token in VISION_TOKENS.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    blocks = -(-(len(tokenizer) + MIN_SPARE_ROWS) // EMBEDDING_MULTIPLE)
    config.text_config.update({**ends, "vocab_size": blocks * EMBEDDING_MULTIPLE})
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(TINY_BASE, **ends)
    return model


def save_checkpoint(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, folder: Path) -> None:
    """Write a complete checkpoint: bf16 weights, configs, processor, and the video budget it was trained with."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / REWARD_CONFIG_NAME).write_text(json.dumps({"video": asdict(TINY_BUDGET)}, indent=2) + "\n")
