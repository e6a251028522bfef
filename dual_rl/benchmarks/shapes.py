"""Qwen3-VL-8B-Instruct's configuration, random weights for it, and the floating-point operations of its passes."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoProcessor, GenerationConfig, Qwen3VLConfig

from verl.core.packing import PackedGroups
from verl.core.row_layout import SharedPromptLayout
from verl.data.scored_sequence import REWARD_TOKEN
from verl.data.vision_process import VideoBudget
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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERA = 1e12


def build_processor(tokenizer: str):
    """The processor of the folder `tokenizer`, with `<Reward>`: no file of the real model is needed."""
    processor = AutoProcessor.from_pretrained(tokenizer)
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return processor


def build_config(tokenizer: str, *, layers: int = TEXT["num_hidden_layers"], is_tiny: bool = False) -> Qwen3VLConfig:
    """The 8B configuration with the token ids of `tokenizer` and `layers` text layers; tiny ones to try a script."""
    ids = Qwen3VLConfig.from_pretrained(tokenizer)
    return Qwen3VLConfig(
        text_config={**(TINY_TEXT if is_tiny else TEXT), "num_hidden_layers": layers},
        vision_config=TINY_VISION if is_tiny else VISION,
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
        vision_end_token_id=ids.vision_end_token_id,
        tie_word_embeddings=False,
    )


class RandomWeights(Mapping):
    """Weights by name and shape, drawn when asked for; a name always gives the same values.

    Matrices are normal with deviation WEIGHT_STD, rounded to bf16; scales of norms are 1, biases 0.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, device: str = DEVICE) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, device=self.device).normal_(std=WEIGHT_STD, generator=generator)
        return values.to(torch.bfloat16).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def build_checkpoint(
    tokenizer: str, shapes: Mapping[str, torch.Size], config: Qwen3VLConfig, *, dtype: torch.dtype
) -> PolicyCheckpoint:
    """A reward model in memory. `shapes`: of the backbone's parameters, under Hugging Face names."""
    hidden = config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    return PolicyCheckpoint(
        config=config,
        generation_config=GenerationConfig(),
        processor=build_processor(tokenizer),
        video_budget=VideoBudget(),
        format_prompt="{{ content | trim }}",
        reward_embedding=torch.randn(hidden, generator=generator) * WEIGHT_STD,
        head_weight=torch.randn(1, hidden, generator=generator) / hidden**0.5,
        weights=RandomWeights(shapes, dtype=dtype),
    )


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
        """Forward and backward with a frozen base: gradients by activations only, flash attention computed again in
        its backward pass, and `recomputed_share` of the layers as well."""
        forward = self.linear + self.adapters + self.attention
        backward = self.linear + 2 * self.adapters + 2.5 * self.attention
        return forward * (1 + recomputed_share) + backward + 2 * self.head

    def attention_update(self, *, recomputed_share: float) -> float:
        """Attention's part of `lora_update`."""
        return self.attention * (3.5 + recomputed_share)

    def lora_model(self) -> float:
        """What the mathematics of `lora_update` asks for: nothing twice."""
        return 2 * self.linear + 3 * self.adapters + 3 * self.attention + 2 * self.head


def linear_weights(config: Qwen3VLConfig) -> int:
    """Weights of the text layers' matrices."""
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    by_layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return by_layer * text.num_hidden_layers


def adapter_weights(config: Qwen3VLConfig, rank: int) -> int:
    """Weights of LoRA on the text layers' matrices."""
    text = config.text_config
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sides = 2 * (text.hidden_size + queries) + 2 * (text.hidden_size + keys)
    sides += 3 * (text.hidden_size + text.intermediate_size)
    return rank * sides * text.num_hidden_layers


def count_row_flops(packed: PackedGroups, config: Qwen3VLConfig, *, lora_rank: int = 0) -> RowFlops:
    """Of a packed row of shared prompts."""
    layout: SharedPromptLayout = packed.layout
    pairs = 0.0
    for prompt, responses in zip(layout.prompt_lengths, layout.response_lengths, strict=True):
        pairs += prompt**2 / 2 + sum(response * prompt + response**2 / 2 for response in responses)
    return count_flops(config, tokens=packed.num_tokens, pairs=pairs, labels=len(packed.labels), lora_rank=lora_rank)


def count_flops(config: Qwen3VLConfig, *, tokens: int, pairs: float, labels: int, lora_rank: int = 0) -> RowFlops:
    """Of `tokens` tokens, `pairs` (query, key) pairs that see each other, and `labels` rows of vocabulary logits."""
    text = config.text_config
    queries = text.num_attention_heads * text.head_dim
    return RowFlops(
        linear=2.0 * linear_weights(config) * tokens,
        adapters=2.0 * adapter_weights(config, lora_rank) * tokens,
        attention=4.0 * queries * pairs * text.num_hidden_layers,
        head=2.0 * text.hidden_size * text.vocab_size * labels,
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


def measure_ceilings() -> dict[str, float]:
    """The card's own: bf16 matrix product of the model's largest shape in TFLOP/s, and device copy in GB/s."""
    if DEVICE != "cuda":
        return {}
    left = torch.randn(16384, TEXT["hidden_size"], device="cuda", dtype=torch.bfloat16)
    right = torch.randn(TEXT["hidden_size"], TEXT["intermediate_size"], device="cuda", dtype=torch.bfloat16)
    product = measure_seconds(lambda: left @ right, repeats=20)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = measure_seconds(lambda: target.copy_(source), repeats=20)
    return {
        "matmul_tflops": 2 * left.numel() * right.shape[1] / product / TERA,
        "copy_gb_per_second": 2 * source.numel() * source.element_size() / copy / 1e9,
    }


def measure_seconds(function, *, repeats: int, warmup: int = 3) -> float:
    """Median by device events."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return sorted(seconds)[len(seconds) // 2]
