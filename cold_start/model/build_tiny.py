"""The tiny base before training: tokenizer, chat template, processor, model configuration and random weights.

The architecture is Qwen3-VL's own, scaled down to under three million parameters. Two things make it cheap to run on
a CPU:

- The tokenizer is a byte-level BPE trained on texts of the toy world, so that their words are one token each. Any
  other text still encodes, byte by byte if need be.
- Every fixed line of the judge prompt is one added token, its newline included, so that this boilerplate costs ten
  tokens instead of some 250. The last four lines (the sentence before the example answer, and the example) are one
  token together: the tags and the JSON of an answer alone, as a chain of thought writes them, remain ordinary tokens.

The embedding table is padded to a multiple of 64 rows and holds spare ones, as Qwen3-VL's does, so that `<Reward>` is
added later without resizing it.
"""

import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from scored_sequence import VIDEO_PLACEHOLDER, judge_problem
from toy_world.scene import sample_clip_scene, sample_request
from toy_world.texts import write_cot, write_prompt
from vision_process import VideoBudget

TINY_BUDGET = VideoBudget(fps=2.0, min_frames=4, max_frames=16, min_pixels=64 * 64, max_pixels=112 * 112)
REWARD_CONFIG_NAME = "reward_config.json"

PAD_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", EOS_TOKEN, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
NUM_BPE_TOKENS = 720
EMBEDDING_MULTIPLE = 64
MIN_SPARE_ROWS = 8
# Qwen's split into words: contractions, words with one leading character, single digits, punctuation, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS_SIZE = 3000
CORPUS_SEED = 0
MAX_TIMESTAMP = 8  # seconds, in the tokenizer's corpus
EXAMPLE_LINES = 4  # the judge prompt's last lines, from "Think first" to "</answer>": one token

PATCH_SIZE = 16
HIDDEN_SIZE = 128
MAX_POSITIONS = 8192
MAX_NEW_TOKENS = 384
PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)
TEXT_SHAPE = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.05,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [4, 6, 6],
        "mrope_interleaved": True,
        "rope_theta": 10000.0,
    },
}
VISION_SHAPE = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_heads": 4,
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN_SIZE,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 2],
    "initializer_range": 0.05,
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def judge_prompt_tokens() -> tuple[str, ...]:
    """The fixed lines of the judge prompt, each of which is one token: newline included, the last four lines joined.

    Lines up to the text-to-video prompt keep the newline before them out, e.g. "- style: the look ...\\n".
    """
    slot = "{prompt}"
    before, after = judge_problem(slot).replace(VIDEO_PLACEHOLDER, "").split(slot)
    lines = [*before.splitlines(keepends=True), *after.splitlines(keepends=True)]
    joined = [*lines[:-EXAMPLE_LINES], "".join(lines[-EXAMPLE_LINES:])]
    return tuple(line for line in joined if line.strip())


def iterate_corpus():
    """Prompts, chains of thought and timestamps of the toy world, for the tokenizer."""
    rng = np.random.default_rng(CORPUS_SEED)
    for _ in range(CORPUS_SIZE):
        request = sample_request(rng, held_out=False)
        yield write_prompt(request, rng)
        yield write_cot(request, sample_clip_scene(request, rng, held_out=False), rng)
        yield f"<{rng.uniform(0, MAX_TIMESTAMP):.1f} seconds>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the toy world, with Qwen3-VL's special tokens and the judge prompt's lines added."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_BPE_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(iterate_corpus(), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(line, special=False, normalized=False) for line in judge_prompt_tokens()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (EOS_TOKEN, PAD_TOKEN)],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Qwen3-VL's processor; image and video frames are normalised alike, which vLLM relies on.

    Its own resizing, used where frames come without a video budget, stays within the same bounds.
    """
    shared = {"patch_size": PATCH_SIZE, "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD)}
    low, high = TINY_BUDGET.min_pixels, TINY_BUDGET.max_pixels
    clip_size = {"shortest_edge": TINY_BUDGET.min_frames * low, "longest_edge": TINY_BUDGET.max_frames * high}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared, size={"shortest_edge": low, "longest_edge": high}),
        video_processor=Qwen3VLVideoProcessor(**shared, size=clip_size, max_frames=TINY_BUDGET.max_frames),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding table: a multiple of EMBEDDING_MULTIPLE with at least MIN_SPARE_ROWS unused ones."""
    blocks = -(-(len(tokenizer) + MIN_SPARE_ROWS) // EMBEDDING_MULTIPLE)
    return blocks * EMBEDDING_MULTIPLE


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3VLForConditionalGeneration:
    """The model with seeded random weights in fp32."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            **TEXT_SHAPE,
            "vocab_size": padded_vocab_size(tokenizer),
            "pad_token_id": ids(PAD_TOKEN),
            "eos_token_id": ids(EOS_TOKEN),
        },
        vision_config=VISION_SHAPE,
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids(VIDEO_PAD),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ids(EOS_TOKEN),
        pad_token_id=ids(PAD_TOKEN),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return model


def save_checkpoint(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, folder: str | os.PathLike
) -> None:
    """Write a complete checkpoint: bf16 weights, configs, processor, and the video budget it was trained with.

    The model itself is left as it is.
    """
    folder = Path(folder)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    budget = {"video": dataclasses.asdict(TINY_BUDGET)}
    (folder / REWARD_CONFIG_NAME).write_text(json.dumps(budget, indent=2) + "\n")
