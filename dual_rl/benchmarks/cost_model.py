"""What a training step of stage 2 costs in seconds and memory: a model of what was measured, and its use on paper.

Fitted to the rows of benchmarks/growth_8b.py, by least squares of relative errors:

- update: pairs * `pair_seconds` + attention / `attention_tflops` + all else / `other_tflops`
- reference: operations / `reference_tflops`
- vision: operations / `vision_tflops`, or pairs * `vision_pair_seconds` where launching kernels takes longer
- least memory, with no layer keeping its activations: `base_gib` + tokens of a pair / 1000 * `gib_per_kilotoken`, by
  rows of one pair; more pairs add the gradients once and each pair's vision features (1.2 GiB with four)
- layers that keep theirs (80 GB card): `layer_tokens` / tokens of a pair, less what verl/model/recompute.py spares

On paper, from shapes alone, with the operations of benchmarks/shapes.py:

- A rank works on ceil(pairs / GPUs) pairs, one after another, all equally long; the step ends with the slowest rank.
- With more than one GPU every pass gathers the weights, which hides behind computation unless it takes longer. The
  LoRA gradients' all-reduce is left out, and no use is made of the memory that sharding frees. Computed, not measured.
- Rollouts: prompts are read once, at `other_tflops`; then every step of decoding reads the weights and the KV cache of
  all sequences at the speed of a device copy. Responses are equally long (uneven ones take longer); all else is free.
- Handing weights over and reading videos are left out.

benchmarks/predict_8b.py prints what it says.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from transformers import Qwen3VLConfig

from pairs import WorkShape
from shapes import TERA, RowFlops, count_flops, count_vision_flops, linear_weights
from verl.config import RolloutConfig
from verl.model.recompute import WORKING_LAYERS

GIB, GIGA, BF16_BYTES, LORA_RANK = 2**30, 1e9, 2, 64
GATHERS = {"vision": 0, "reference": 1, "update": 3}
"""Of the text weights by a pair's pass: forward, recomputation, backward. At most: the last two can share one."""
KV_GIB = 29.0
"""For the KV cache on a card of 80 GB at worker.rollout.gpu_memory_utilization=0.6, beside the weights."""
MAX_LIVE = RolloutConfig().max_num_seqs
TEXT_TOKENS, FRAME_TOKENS = 1300, 98
"""Of a prompt as benchmarks/growth_8b.py lengthens the video: without it, and for a frame of 448 x 448 pixels."""
PHASES = ("vision", "reference", "update")


@dataclass(frozen=True)
class StepShape:
    """A step. `n`: responses a video. `prompt_tokens`: video included. `response_tokens`: mean, without `<Reward>`.
    `longest_tokens`: of the longest response, None for all being equal. `frames` of `side` x `side` pixels, even.
    """

    pairs: int = 1
    n: int = 8
    prompt_tokens: float = 2400
    response_tokens: float = 600
    frames: float = 12
    side: int = 448
    gpus: int = 1
    longest_tokens: float | None = None

    def change(self, axis: str, value: float) -> "StepShape":
        """With another value of a field; more frames lengthen the prompt."""
        longer = {"prompt_tokens": TEXT_TOKENS + FRAME_TOKENS * value} if axis == "frames" else {}
        return replace(self, **{axis: value}, **longer)

    @property
    def row_tokens(self) -> int:
        """Of a pair's packed row: each prompt once, each response with its `<Reward>`."""
        return round(2 * (self.prompt_tokens + self.n * (self.response_tokens + 1)))


@dataclass(frozen=True)
class MeasuredRow:
    """A row of growth_8b.py. `seconds`, `teraflops`: by phase, `update_attention` beside; `packed_tokens`: of all
    pairs; `least_memory_gib`: with no layer keeping its activations.
    """

    axis: str
    shape: StepShape
    packed_tokens: int
    seconds: Mapping[str, float]
    teraflops: Mapping[str, float]
    kept_layers: int
    least_memory_gib: float

    @property
    def row_tokens(self) -> float:
        """Of a pair, on average."""
        return self.packed_tokens / self.shape.pairs

    @property
    def drawn_shape(self) -> StepShape:
        """With the mean of the lengths that were drawn."""
        response = (self.row_tokens / 2 - self.shape.prompt_tokens) / self.shape.n - 1
        return replace(self.shape, response_tokens=response)


def read_rows(growth: Mapping) -> Iterator[MeasuredRow]:
    """Rows of a file of growth_8b.py, axis by axis; shapes have the middle of what is drawn from."""
    base, measured = vars(WorkShape(pairs=1)), {field.name for field in fields(MeasuredRow)}
    for axis, rows in growth["growth"].items():
        for row in rows:
            work = {name: float(np.mean(row.get(name, value))) for name, value in base.items()}
            shape = StepShape(**{**work, **{name: int(work[name]) for name in ("pairs", "n", "side")}})
            yield MeasuredRow(axis, shape, **{name: value for name, value in row.items() if name in measured})


@dataclass(frozen=True)
class CostModel:
    """Fields as in the formulas above: seconds, TFLOP/s, GiB, layers times tokens, GB/s of a device copy."""

    pair_seconds: float
    attention_tflops: float
    other_tflops: float
    reference_tflops: float
    vision_pair_seconds: float
    vision_tflops: float
    base_gib: float
    gib_per_kilotoken: float
    layer_tokens: float
    copy_gb_per_second: float

    def seconds(self, teraflops: Mapping[str, float], *, pairs: int) -> dict[str, float]:
        """By phase, of `pairs` pairs with the operations of growth_8b.py, in 10^12."""
        attention = teraflops["update_attention"]
        other = teraflops["update"] - attention
        return {
            "vision": max(pairs * self.vision_pair_seconds, teraflops["vision"] / self.vision_tflops),
            "reference": teraflops["reference"] / self.reference_tflops,
            "update": pairs * self.pair_seconds + attention / self.attention_tflops + other / self.other_tflops,
        }

    def least_memory_gib(self, row_tokens: float) -> float:
        return self.base_gib + row_tokens / 1000 * self.gib_per_kilotoken

    def count_kept_layers(self, row_tokens: float, *, layers: int) -> int:
        return min(layers, max(0, int(self.layer_tokens / row_tokens) - WORKING_LAYERS))


def fit_model(rows: Sequence[MeasuredRow], *, layers: int, copy_gb_per_second: float) -> CostModel:
    """`layers`: of the text model. Raises ValueError where the rows cannot tell a field."""
    seconds = {phase: np.array([row.seconds[phase] for row in rows]) for phase in PHASES}
    flops = {name: np.array([row.teraflops[name] for row in rows]) for name in (*PHASES, "update_attention")}
    pairs = np.array([row.shape.pairs for row in rows])
    parts = np.stack([pairs, flops["update_attention"], flops["update"] - flops["update_attention"]], axis=1)
    pair_seconds, by_attention, by_other = _fit(parts, seconds["update"])
    (by_reference,) = _fit(flops["reference"][:, None], seconds["reference"])
    floor, by_vision = _fit_above_floor(pairs, flops["vision"], seconds["vision"])
    single = [row for row in rows if row.shape.pairs == 1]
    slope, base = np.polyfit([row.row_tokens / 1000 for row in single], [row.least_memory_gib for row in single], 1)
    some_kept = [row for row in rows if 0 < row.kept_layers < layers]
    if not some_kept:
        raise ValueError("no row kept the activations of some layers only: measure longer or shorter ones")
    layer_tokens = np.mean([(row.kept_layers + WORKING_LAYERS + 0.5) * row.row_tokens for row in some_kept])
    times = (pair_seconds, 1 / by_attention, 1 / by_other, 1 / by_reference, floor, 1 / by_vision)
    return CostModel(*map(float, (*times, base, slope, layer_tokens, copy_gb_per_second)))


def _fit(parts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds by unit of each of the columns of `parts`, [rows, columns], with the least relative errors."""
    solution = np.linalg.lstsq(parts / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    if not (solution > 0).all():
        raise ValueError(f"these rows give costs of {solution}, which have to be positive: measure more shapes")
    return solution


def _fit_above_floor(pairs: np.ndarray, flops: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(a, b) of max(a * pairs, b * flops): the best of all ways to let the smallest rows lie on the floor."""
    order = np.argsort(flops / pairs, kind="stable")
    fits = []
    for count in range(1, len(order)):
        low, high = order[:count], order[count:]
        floor, rate = _fit(pairs[low, None], seconds[low])[0], _fit(flops[high, None], seconds[high])[0]
        errors = np.maximum(floor * pairs, rate * flops) / seconds - 1
        fits.append((float((errors**2).sum()), float(floor), float(rate)))
    return min(fits)[1:]


class Paper:
    """Predicts steps from shapes alone. `bus_gb_per_second`: at which GPUs gather weights from each other."""

    def __init__(self, model: CostModel, config: Qwen3VLConfig, *, bus_gb_per_second: float) -> None:
        self.model, self.config = model, config
        self.bus_gb_per_second = bus_gb_per_second
        self.layers = config.text_config.num_hidden_layers

    def predict(self, shape: StepShape) -> dict[str, float]:
        """Seconds by phase and of the step, tokens of a pair's row, layers that keep, and the least memory in GiB."""
        by_pair = self.model.seconds(self.count_pair(shape), pairs=1)
        gather, pairs = self._gather_seconds(shape.gpus), math.ceil(shape.pairs / shape.gpus)
        generate = self.generate_seconds(shape)
        seconds = {name: pairs * max(by_pair[name], GATHERS[name] * gather) for name in PHASES}
        return {
            "generate": generate,
            **seconds,
            "step": generate + sum(seconds.values()),
            "row_tokens": shape.row_tokens,
            "kept_layers": self.model.count_kept_layers(shape.row_tokens, layers=self.layers),
            "least_gib": self.model.least_memory_gib(shape.row_tokens),
        }

    def count_pair(self, shape: StepShape) -> dict[str, float]:
        """Operations of one pair, in 10^12, as growth_8b.py counts them."""
        recomputed = 1 - self.model.count_kept_layers(shape.row_tokens, layers=self.layers) / self.layers
        flops = self._count_row(shape, lora_rank=LORA_RANK)
        counts = {
            "vision": 2 * self._count_video(shape),
            "reference": self._count_row(shape, lora_rank=0).forward(),
            "update": flops.lora_update(recomputed_share=recomputed),
            "update_attention": flops.attention_update(recomputed_share=recomputed),
        }
        return {name: count / TERA for name, count in counts.items()}

    def _count_row(self, shape: StepShape, *, lora_rank: int) -> RowFlops:
        prompt, response = shape.prompt_tokens, shape.response_tokens + 1
        seen = 2 * (prompt**2 / 2 + shape.n * (response * prompt + response**2 / 2))
        labels = round(2 * shape.n * response)  # EOS is one, `<Reward>` is not
        return count_flops(self.config, tokens=shape.row_tokens, pairs=seen, labels=labels, lora_rank=lora_rank)

    def _count_video(self, shape: StepShape) -> float:
        vision = self.config.vision_config
        patches = shape.side // vision.patch_size
        return count_vision_flops(self.config, (round(shape.frames / vision.temporal_patch_size), patches, patches))

    def _gather_seconds(self, gpus: int) -> float:
        """Of the text weights once; a GPU has its own share of them."""
        num_bytes = BF16_BYTES * linear_weights(self.config) * (gpus - 1) / gpus
        return num_bytes / (self.bus_gb_per_second * GIGA)

    def generate_seconds(self, shape: StepShape) -> float:
        """Of the rollouts of a rank's pairs, in as many rounds as the KV cache needs; a prompt's cache is read once
        for its responses."""
        text, response = self.config.text_config, shape.response_tokens
        videos, prompt = 2 * math.ceil(shape.pairs / shape.gpus), shape.prompt_tokens
        weight_bytes = BF16_BYTES * (linear_weights(self.config) + text.hidden_size * text.vocab_size)
        token_bytes = 2 * BF16_BYTES * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        fitting = KV_GIB * GIB / (token_bytes * (prompt / shape.n + response))
        rounds = max(1.0, videos * shape.n / max(1.0, min(MAX_LIVE, fitting)))
        read = rounds * (shape.longest_tokens or response) * weight_bytes
        read += videos * token_bytes * (response * prompt + shape.n * response**2 / 2)
        prefill = count_flops(self.config, tokens=round(prompt), pairs=prompt**2 / 2, labels=1).forward()
        by_video = prefill / self.model.other_tflops + self._count_video(shape) / self.model.vision_tflops
        return read / (self.model.copy_gb_per_second * GIGA) + videos * by_video / TERA
