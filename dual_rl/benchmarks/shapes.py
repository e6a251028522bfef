"""Qwen3-VL-8B-Instruct's configuration, random weights for it, and the floating-point operations of its passes."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoProcessor, GenerationConfig, Qwen3VLConfig

from harness import DEVICE
from verl.config import ModelConfig
from verl.core.packing import PackedGroups
from verl.data.scored_sequence import REWARD_TOKEN
from verl.data.vision_process import VideoBudget
from verl.model.building import build_policy
from verl.model.reward_files import PolicyCheckpoint

TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
        "rope_theta": 5_000_000,
    },
}
VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}
TINY_TEXT = {
    **TEXT,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 640,
    "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]},
}
TINY_VISION = {
    **VISION,
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [0],
}
WEIGHT_STD = 0.02


def build_processor(tokenizer: str):
    """The processor of the folder `tokenizer`, with `<Reward>`: no file of the real model is needed."""
    processor = AutoProcessor.from_pretrained(tokenizer)
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return processor


def build_config(tokenizer: str, *, layers: int = TEXT["num_hidden_layers"], is_tiny: bool = False) -> Qwen3VLConfig:
    """The 8B configuration with the token ids of `tokenizer` and `layers` text layers; tiny ones to try a script."""
    ids = Qwen3VLConfig.from_pretrained(tokenizer)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLConfig(
        text_config={**(TINY_TEXT if is_tiny else TEXT), "num_hidden_layers": layers},
        vision_config=TINY_VISION if is_tiny else VISION,
        tie_word_embeddings=False,
        **{name: getattr(ids, name) for name in names},
    )


class RandomWeights(Mapping):
    """Weights by name and shape, drawn on demand; a name always gives the same values.

    Matrices are normal with deviation WEIGHT_STD, rounded to bf16; scales of norms are 1, biases 0.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype) -> None:
        self.shapes, self.dtype = shapes, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=self.dtype, device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, device=DEVICE).normal_(std=WEIGHT_STD, generator=generator)
        return values.to(torch.bfloat16).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def build_checkpoint(tokenizer: str, config: Qwen3VLConfig, *, dtype: torch.dtype) -> PolicyCheckpoint:
    """A reward model in memory, with random weights under Hugging Face names."""
    hidden = config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, torch.Size] = {}
    checkpoint = PolicyCheckpoint(
        config=config,
        generation_config=GenerationConfig(),
        processor=build_processor(tokenizer),
        video_budget=VideoBudget(),
        format_prompt="{{ content | trim }}",
        reward_embedding=torch.randn(hidden, generator=generator) * WEIGHT_STD,
        head_weight=torch.randn(1, hidden, generator=generator) / hidden**0.5,
        weights=RandomWeights(shapes, dtype=dtype),
    )
    backbone = build_policy(checkpoint, ModelConfig()).backbone  # on the meta device
    shapes.update((name, parameter.shape) for name, parameter in backbone.named_parameters())
    return checkpoint


@dataclass(frozen=True)
class RowFlops:
    """Operations of one forward pass over a row, by part. A multiplication with its addition counts as two."""

    linear: float
    adapters: float
    attention: float
    head: float

    def forward(self) -> float:
        return self.linear + self.adapters + self.attention + self.head

    def lora_update(self, *, recomputed_share: float) -> float:
        """Forward and backward with a frozen base: gradients of activations only, flash attention computed again in
        its backward pass, and `recomputed_share` of the layers as well."""
        forward = self.linear + self.adapters + self.attention
        backward = self.linear + 2 * self.adapters + 2.5 * self.attention
        return forward * (1 + recomputed_share) + backward + 2 * self.head

    def lora_model(self) -> float:
        """What the mathematics of `lora_update` needs: nothing twice."""
        return 2 * self.linear + 3 * self.adapters + 3 * self.attention + 2 * self.head


def count_row_flops(packed: PackedGroups, config: Qwen3VLConfig, *, lora_rank: int = 0) -> RowFlops:
    """Of a packed row of shared prompts."""
    text, layout = config.text_config, packed.layout
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attention = [(text.hidden_size, queries), *[(text.hidden_size, keys)] * 2, (queries, text.hidden_size)]
    matrices = [*attention, *[(text.hidden_size, text.intermediate_size)] * 3]
    visible = 0.0  # (query, key) pairs
    for prompt, responses in zip(layout.prompt_lengths, layout.response_lengths, strict=True):
        visible += prompt**2 / 2 + sum(response * prompt + response**2 / 2 for response in responses)
    by_token = 2.0 * text.num_hidden_layers * packed.num_tokens
    return RowFlops(
        linear=by_token * sum(rows * columns for rows, columns in matrices),
        adapters=by_token * lora_rank * sum(rows + columns for rows, columns in matrices),
        attention=4.0 * queries * visible * text.num_hidden_layers,
        head=2.0 * text.hidden_size * text.vocab_size * len(packed.labels),
    )


def count_vision_flops(config: Qwen3VLConfig, grid_thw: tuple[int, int, int]) -> float:
    """Of the vision tower's forward pass over one video."""
    vision = config.vision_config
    groups, height, width = grid_thw
    patches, merge = groups * height * width, vision.spatial_merge_size**2
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    merged = vision.hidden_size * merge
    merger = (merged**2 + merged * vision.out_hidden_size) * (1 + len(vision.deepstack_visual_indexes)) / merge
    attention = 4.0 * vision.hidden_size * groups * (height * width) ** 2 * vision.depth
    return 2.0 * patches * (block * vision.depth + merger) + attention
