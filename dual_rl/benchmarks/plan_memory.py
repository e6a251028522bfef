"""What each size of Qwen3-VL needs in device memory and on disk, computed from its shape: nothing is measured here.

    PYTHONPATH=. python benchmarks/plan_memory.py

Weights are counted on the meta device. Frozen ones take 2 bytes; trained ones 16 (fp32, gradient, AdamW's moments).
Several GPUs share all of them (FSDP2, ZeRO-3); each has embeddings and one text layer whole. Every layer recomputes
its activations: a token keeps each layer's input, and WORKING times the widths of the one layer at work. WORKING was
fitted to the least memory that benchmarks/update_8b.py measured for the 8B update on one H100; not that of experts.
"""

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from descore.base_models import find_model_class
from harness import GIB
from shapes import TEXT, VISION
from verl.model.building import LANGUAGE_LINEARS

SMALL_TOWER = {**VISION, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
SMALL_TOWER["deepstack_visual_indexes"] = [5, 11, 17]
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
SIZES = {  # hidden, MLP, layers, heads, key heads, tower, experts; as published by Qwen
    "2B": (2048, 6144, 28, 16, 8, SMALL_TOWER, {}),
    "4B": (2560, 9728, 36, 32, 8, SMALL_TOWER, {}),
    "8B": (4096, 12288, 36, 32, 8, VISION, {}),
    "32B": (5120, 25600, 64, 64, 8, VISION, {}),
    "30B-A3B": (2048, 6144, 48, 32, 4, VISION, EXPERTS),
}
TIED, RANK = ("2B", "4B"), 64
GPUS = (1, 2, 8)
WORKING = {"hidden": 15, "mlp": 6, "chosen": 6}
"""Numbers per token of the layer at work, by unit of hidden size, of the MLPs' and of the states given to experts."""
MEASURED = Path(__file__).with_name("results") / "growth_h100.json"
STAGE_1_TOKENS, STAGE_2_TOKENS = 6_000, 16_000
"""Of a pass over one pair: prompts of 2,400, CoTs of 600; prompts of 3,200 with 8 responses of 600."""


@dataclass(frozen=True)
class Needs:
    """Numbers of parameters, and bytes per token of a row; `whole`: those that each of several GPUs has whole."""

    text: int
    whole: int
    vision: int
    adapters: int
    token_bytes: int

    def gib(self, *, trained: int, tokens: int, gpus: int, engine: bool = False) -> float:
        """Of one GPU. `engine`: with vLLM's whole weights beside, and without gradients and activations."""
        total = self.text + self.vision
        if trained == self.adapters:
            total += trained
        held = 2 * (total - trained) + (12 if engine else 16) * trained
        working = 2 * (self.text + self.vision) if engine else tokens * self.token_bytes
        return (held / gpus + working + (2 * self.whole if gpus > 1 else 0)) / GIB


@cache
def count(size: str) -> Needs:
    """What a model of this size consists of."""
    hidden, mlp, layers, heads, key_heads, tower, experts = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, **experts}
    config = AutoConfig.for_model(
        "qwen3_vl_moe" if experts else "qwen3_vl",
        text_config=TEXT | shape,
        vision_config=tower | {"out_hidden_size": hidden},
        tie_word_embeddings=size in TIED,
    )
    with init_empty_weights():
        model = find_model_class(config, size)(config)
    model.tie_weights()
    linears = [m for name, m in model.named_modules() if re.fullmatch(LANGUAGE_LINEARS, name)]
    vision = count_parameters(model.model.visual)
    text, layer = count_parameters(model) - vision, count_parameters(model.model.language_model.layers[0])
    chosen = experts.get("num_experts_per_tok", 0)
    width = chosen * experts["moe_intermediate_size"] if experts else mlp
    working = WORKING["hidden"] * hidden + WORKING["mlp"] * width + WORKING["chosen"] * chosen * hidden
    return Needs(
        text=text,
        whole=text - (layers - 1) * layer,
        vision=vision,
        adapters=RANK * sum(linear.in_features + linear.out_features for linear in linears),
        token_bytes=2 * (hidden * layers + working),
    )


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make_row(size: str) -> str:
    """Of the table in MEASUREMENTS.md."""
    needs = count(size)

    def cell(**settings) -> str:
        return " / ".join(f"{needs.gib(gpus=gpus, **settings):.0f}" for gpus in GPUS)

    stage_1 = (
        needs.gib(trained=needs.vision, tokens=STAGE_1_TOKENS, gpus=g) + 16 * needs.adapters / g / GIB for g in GPUS
    )
    cells = (
        size,
        f"{(needs.text + needs.vision) / 1e9:.1f}",
        " / ".join(f"{gib:.0f}" for gib in stage_1),
        cell(trained=needs.adapters, tokens=STAGE_2_TOKENS),
        cell(trained=needs.adapters, tokens=0, engine=True),
        cell(trained=needs.text, tokens=STAGE_2_TOKENS),
        f"{4 * (needs.vision + needs.adapters) / GIB:.0f}",
        f"{(2 * (needs.text + needs.vision) + 12 * needs.adapters) / GIB:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def largest_error() -> float:
    """GiB, over the measured passes of one pair."""
    growth, needs = json.loads(MEASURED.read_text())["growth"], count("8B")
    points = [point for part in ("n", "response_tokens", "frames") for point in growth[part]]
    computed = [needs.gib(trained=needs.adapters, tokens=point["packed_tokens"], gpus=1) for point in points]
    return max(abs(gib - point["least_memory_gib"]) for gib, point in zip(computed, points, strict=True))


if __name__ == "__main__":
    lines = [*map(make_row, SIZES), f"within {largest_error():.1f} GiB of what was measured"]
    sys.stdout.write("\n".join([*lines, ""]))
