"""A small reward model, prompts of made-up clips, and responses, for the tests of packing and of the model."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from experts import with_experts
from slow_path import load_policy
from verl.config import ModelConfig
from verl.data.scored_sequence import REWARD_TOKEN, SequenceBuilder, judge_problem
from verl.data.vision_process import VideoBudget, VideoFrames
from verl.model.policy import PolicyModel
from verl.model.reward_files import PolicyCheckpoint, load_checkpoint, save_head
from verl.types import PairRollout, PreferencePair, Response, ResponseKey, VideoKey, VideoPrompt

DUAL_RL = Path(__file__).resolve().parents[1]
EXAMPLE_CSV = DUAL_RL / "data" / "example.csv"
CLIPS = sorted((DUAL_RL / "data" / "videos").glob("*.mp4"))
TINY_BASE = DUAL_RL.parent / "cold_start" / "model" / "tiny_base"
SMALL_BUDGET = VideoBudget(max_frames=8, min_pixels=64 * 64, max_pixels=64 * 96)
LETTERS = "the quick brown fox jumps over a lazy dog and 0 1 2 "
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

Group = tuple[VideoPrompt, tuple[Response, ...]]


def write_small_model(
    folder: Path, *, tied: bool = False, has_experts: bool = False, has_reward: bool = True, spare_rows: int = 8
) -> Path:
    """A random two-layer reward model, merged: Hugging Face files, `rm_head.pth` and `reward_config.json`."""
    config = copy.deepcopy(Qwen3VLConfig.from_pretrained(TINY_BASE))
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    if has_reward:
        processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    config.text_config.vocab_size = len(processor.tokenizer) + spare_rows
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    config.vision_config.deepstack_visual_indexes = [0]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    for parameter in model.parameters():  # stock initialisation hardly lets inputs show in the outputs
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    if has_experts:
        model = with_experts(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if has_reward:
        save_head(folder / "rm_head.pth", torch.randn(1, config.text_config.hidden_size))
    values = {"base_model": None, "reward_token": "special", "video": asdict(SMALL_BUDGET)}
    (folder / "reward_config.json").write_text(json.dumps({**values, "format_prompt": "{{ content }}"}))
    return folder


@cache
def small_checkpoint(folder: Path) -> PolicyCheckpoint:
    return load_checkpoint(folder, with_weights=True)


def make_builder(checkpoint: PolicyCheckpoint) -> SequenceBuilder:
    return SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)


def make_policy(checkpoint: PolicyCheckpoint) -> PolicyModel:
    """A policy in training mode."""
    return load_policy(checkpoint, ModelConfig(model_path="")).train()


def make_video(number: int) -> VideoFrames:
    """Noise of one of several sizes and lengths."""
    generator = torch.Generator().manual_seed(number)
    num_frames, width = 4 + 2 * (number % 2), 64 + 32 * (number % 3 == 1)
    return VideoFrames(
        frames=torch.randint(0, 256, (num_frames, 3, 64, width), dtype=torch.uint8, generator=generator),
        source_fps=8.0,
        frame_indices=tuple(range(0, 4 * num_frames, 4)),
        total_frames=4 * num_frames,
    )


def problem_of(number: int) -> str:
    """The user turn of the `number`-th video."""
    return judge_problem(f"a red circle, number {number}")


def make_group(builder: SequenceBuilder, number: int, lengths: Sequence[int]) -> Group:
    """The `number`-th video with one response of each length; a negative length is one cut at the limit.

    Length -1 is cut with no token at all: no label, only a reward.
    """
    key = VideoKey(number // 2, "AB"[number % 2])
    prompt = builder.encode_prompt(key, problem_of(number), make_video(number))
    text_ids = builder.tokenizer(LETTERS * 20, add_special_tokens=False)["input_ids"]
    responses = []
    for sample, length in enumerate(lengths):
        is_finished, count = length >= 0, length if length >= 0 else -length - 1
        start = 5 * number + 3 * sample
        ids = tuple(text_ids[start : start + count])
        response_key = ResponseKey(*key, sample)
        log_probs = torch.zeros(count + is_finished)
        responses.append(Response(response_key, ids, is_finished, log_probs))
    return prompt, tuple(responses)


def make_pair(pair_id: int = 0, preference: int | None = 1) -> PreferencePair:
    return PreferencePair(pair_id, ("a.mp4", "b.mp4"), "problem", f"answer {pair_id}", preference)


def make_response(key: ResponseKey, length: int, *, is_finished: bool = True) -> Response:
    """Of made-up tokens."""
    return Response(key, tuple(range(length)), is_finished, torch.zeros(length + is_finished))


def make_rollout(
    pair_id: int, lengths_a: Sequence[int], lengths_b: Sequence[int], *, prompt_tokens: tuple[int, int] = (3, 3)
) -> PairRollout:
    """A pair with one response of each length."""
    sides = [
        tuple(make_response(ResponseKey(pair_id, side, sample), length) for sample, length in enumerate(lengths))
        for side, lengths in (("A", lengths_a), ("B", lengths_b))
    ]
    return PairRollout(make_pair(pair_id), *sides, prompt_tokens=prompt_tokens)


def pixels_of(groups: Sequence[Group], builder: SequenceBuilder) -> torch.Tensor:
    return torch.cat([builder.pixel_values(prompt) for prompt, _ in groups])


def hub_weights(model: PolicyModel) -> dict[str, torch.Tensor]:
    """Weights of an unsharded policy without an adapter, with the `<Reward>` row in its place."""
    weights = {
        name.removeprefix("backbone."): p.detach() for name, p in model.named_parameters() if "backbone" in name
    }
    name = "model.language_model.embed_tokens.weight"
    weights[name] = weights[name].clone()
    weights[name][model.reward_token_id] = model.reward_embedding.detach()
    return weights
