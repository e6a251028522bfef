"""Qwen3-VL-8B-Instruct's configuration, random weights for it, and the floating-point operations of a step."""

import zlib
from collections.abc import Iterable

import torch
from torch.utils.benchmark import Timer
from transformers import Qwen3VLConfig

from data import EncodedPair

GIB = 2**30
TERA = 1e12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT_STD = 0.02
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
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


def build_config(ids: Qwen3VLConfig, *, layers: int, is_tiny: bool) -> Qwen3VLConfig:
    """The 8B configuration with the token ids of `ids` and `layers` text layers; tiny ones to try a script."""
    return Qwen3VLConfig(
        text_config={**(TINY_TEXT if is_tiny else TEXT), "num_hidden_layers": layers},
        vision_config=TINY_VISION if is_tiny else VISION,
        tie_word_embeddings=False,
        **{name: getattr(ids, name) for name in TOKEN_IDS},
    )


@torch.no_grad()
def randomize(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Matrices normal with deviation WEIGHT_STD, rounded to bf16, by name; vectors stay as they are."""
    for name, parameter in parameters:
        if parameter.ndim > 1:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            values = torch.empty(parameter.shape, device=parameter.device).normal_(std=WEIGHT_STD, generator=generator)
            parameter.copy_(values.to(torch.bfloat16))


def count_pair_flops(pair: EncodedPair, config: Qwen3VLConfig, *, lora_rank: int) -> float:
    """What a pair's forward and backward pass must do: frozen text layers with LoRA, a tuned vision tower.

    A multiplication with its addition counts as two; nothing is counted twice that a step need not do twice.
    """
    text, total = config.text_config, 0.0
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    by_token = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    sides = 2 * (text.hidden_size + queries) + 2 * (text.hidden_size + keys)
    sides += 3 * (text.hidden_size + text.intermediate_size)
    for sequence in (pair.sequence_a, pair.sequence_b):
        tokens = sequence.input_ids.numel()
        attention = 4.0 * queries * tokens**2 / 2
        layer = 2 * 2.0 * by_token * tokens + 3 * 2.0 * lora_rank * sides * tokens + 3 * attention
        total += layer * text.num_hidden_layers + 3 * count_vision_flops(config, sequence.grid_thw)
    return total


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
    """The card's own: bf16 matrix product of the model's largest shape in TFLOP/s."""
    if DEVICE != "cuda":
        return {}
    left = torch.randn(16384, TEXT["hidden_size"], device="cuda", dtype=torch.bfloat16)
    right = torch.randn(TEXT["hidden_size"], TEXT["intermediate_size"], device="cuda", dtype=torch.bfloat16)
    timer = Timer("left @ right", globals={"left": left, "right": right})
    seconds = timer.blocked_autorange(min_run_time=0.5).median
    return {"matmul_tflops": 2 * left.numel() * right.shape[1] / seconds / TERA}
