"""The update of stage 2 with a model of Qwen3-VL-8B's shape on one GPU: ours against the original's algorithm.

    PYTHONPATH=. python benchmarks/update_8b.py --output results/update_h100.json
    PYTHONPATH=. python benchmarks/update_8b.py --parts growth --output results/growth_h100.json

Both get the same pairs (benchmarks/pairs.py) and weights, train LoRA and do all that follows the rollout: vision
features, old and reference log-probs, forward, backward; ours its optimizer step as well. Each part runs in a process
of its own. `--tiny --layers 2 --pairs 2` tries the script on a CPU.

- check: both with few text layers, and the original in fp32: how far the gradients of each are from that.
- ours: `ExperienceMaker` and `Learner`, as the trainer runs them.
- original: benchmarks/original.py.
- growth: ours over more responses, longer ones, a longer video or more pairs. Each shape is run with as many layers
  keeping their activations as fit (its time counts), and with none (its peak memory is the least that it needs).
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from harness import (
    DEVICE,
    TERA,
    TINY_BASE,
    clock,
    describe_machine,
    make_parser,
    measure_ceilings,
    peak_memory_gib,
    reset_peak_memory,
    run_parts,
    write_result,
)
from original import build_original, fill_adapters
from pairs import Work, WorkShape, make_work
from shapes import build_checkpoint, build_config, count_row_flops, count_vision_flops
from verl.config import Config
from verl.model.flash_kernels import choose_kernels
from verl.model.reward_files import PolicyCheckpoint
from verl.workers.experience import ExperienceMaker, RankBatch
from verl.workers.learner import Learner
from verl.workers.model_setup import PolicyRuntime, build_runtime
from verl.workers.parallel import join_process_group

PORT = 29511
PHASES = ("vision", "reference", "update")
CHECK_LAYERS = 4
CHECK_SHAPE = WorkShape(pairs=1, n=3, prompt_tokens=1300, response_tokens=(100, 300))
GROWTH = {
    "n": [{"n": n} for n in (2, 4, 8, 16)],
    "response_tokens": [{"response_tokens": (length, length)} for length in (300, 600, 1200, 2400)],
    "frames": [{"frames": (count, count), "prompt_tokens": 1300 + 98 * count} for count in (4, 12, 24, 48)],
    "pairs": [{"pairs": count} for count in (1, 2, 4)],
}


def make_config(options: argparse.Namespace) -> Config:
    """Settings of both; the learning rate is 0, so that every repetition starts from the same weights."""
    config = Config()
    actor = config.worker.actor
    actor.model.lora.rank, actor.model.lora.alpha = options.lora_rank, 2 * options.lora_rank
    actor.model.enable_compile = not options.no_compile
    actor.model.max_kept_layers = options.max_kept_layers
    actor.optim.lr = 0.0
    actor.max_grad_norm = 1e9
    config.worker.rollout.max_log_prob_difference = 1e9  # the rollout's are zeros
    return config


def make_checkpoint(options: argparse.Namespace, *, layers: int, dtype: torch.dtype) -> PolicyCheckpoint:
    config = build_config(options.tokenizer, layers=layers, is_tiny=options.tiny)
    return build_checkpoint(options.tokenizer, config, dtype=dtype)


class Ours:
    """Our update on one rank, as a worker runs it."""

    def __init__(self, options: argparse.Namespace, *, layers: int) -> None:
        rank = join_process_group(index=0, world_size=1, address="localhost", port=PORT)
        checkpoint = make_checkpoint(options, layers=layers, dtype=torch.bfloat16)
        config = make_config(options)
        self.runtime: PolicyRuntime = build_runtime(checkpoint, config, rank)
        fill_adapters(self.runtime.actor)
        micro_batch_size = config.worker.actor.micro_batch_size_per_device_for_experience
        self.experience = ExperienceMaker(self.runtime, micro_batch_size=micro_batch_size, temperature=1.0)
        self.learner = Learner(self.runtime, self.experience, config)
        self.gradients: dict[str, torch.Tensor] = {}

    def run(self, work: Work) -> dict[str, float]:
        """One step; seconds by phase, and the update's metrics."""
        batch = RankBatch((work.rollouts,), work.rollouts[0], dict(work.prompts))
        seconds: dict[str, float] = {}
        with clock(seconds, "vision"):
            self.experience.encode_vision(batch)
        with clock(seconds, "reference"):
            batch.ref_log_probs = self.experience.ref_log_probs(batch)
        with clock(seconds, "update"):
            metrics = self.learner.learn(batch, work.advantages, step=1, lr_factor=1.0)
        kept = self.runtime.activations.num_kept
        return {**seconds, "loss": metrics["actor/loss"], "bt": metrics["bt/loss"], "kept_layers": kept}

    @property
    def text_attention(self) -> str:
        """Name of the kernels."""
        head_dim = self.runtime.checkpoint.config.text_config.head_dim
        return choose_kernels(torch.empty(1, head_dim, device=DEVICE)).__name__ if DEVICE == "cuda" else "SDPA"

    def keep_gradients(self) -> None:
        """Keep those of the next step."""

        def keep(*_) -> None:
            for name, parameter in self.runtime.actor.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    self.gradients[name] = whole.float().cpu()

        self.runtime.optimizer.register_step_pre_hook(keep)

    def count_flops(self, work: Work) -> dict[str, float]:
        """Operations of a step: executed ones by phase, and those that the update needs."""
        totals = dict.fromkeys((*PHASES, "update_needed"), 0.0)
        config, rank = self.runtime.checkpoint.config, self.learner.config.worker.actor.model.lora.rank
        batch = RankBatch((work.rollouts,), work.rollouts[0], dict(work.prompts))
        recomputed = 1 - self.runtime.activations.num_kept / config.text_config.num_hidden_layers
        for micro_batch in batch.split(work.rollouts, 1, count=len(work.rollouts)):
            packed = batch.pack(micro_batch, self.runtime.builder, torch.device("cpu"))
            flops = count_row_flops(packed, config, lora_rank=rank)
            totals["vision"] += sum(count_vision_flops(config, grid) for grid in packed.grid_thw)
            totals["reference"] += count_row_flops(packed, config).forward()
            totals["update"] += flops.lora_update(recomputed_share=recomputed)
            totals["update_needed"] += flops.lora_model()
        return totals


def count_packed_tokens(work: Work) -> int:
    return sum(rollout.num_tokens for rollout in work.rollouts)


def run_ours(options: argparse.Namespace) -> dict:
    ours = Ours(options, layers=options.layers)
    work = make_work(ours.runtime.builder, WorkShape(pairs=options.pairs))
    first: dict[str, float] = {}
    with clock(first, "seconds"):
        ours.run(work.first(2))
    ours.run(work)
    reset_peak_memory()
    runs = [ours.run(work) for _ in range(options.repeats)]
    phases = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    flops = ours.count_flops(work)
    one = ours.run(work.first(1))
    result = {
        "pairs": options.pairs,
        "packed_tokens": count_packed_tokens(work),
        "first_pass_seconds": first["seconds"],
        "seconds": phases,
        "runs": runs,
        "pairs_per_second": options.pairs / sum(phases[name] for name in PHASES),
        "tflops_executed": {name: flops[name] / TERA / phases[name] for name in PHASES},
        "tflops_needed_by_update": flops["update_needed"] / TERA / phases["update"],
        "first_pair_loss": {"loss": one["loss"], "bt": one["bt"]},
        "text_attention": ours.text_attention,
        "peak_memory_gib": peak_memory_gib(),
        "ceilings": measure_ceilings(),
    }
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            ours.run(work.first(1))
        table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90)
        options.profile.write_text(table)
    return result


def run_original(options: argparse.Namespace) -> dict:
    """The faster of two steps over one pair."""
    checkpoint = make_checkpoint(options, layers=options.layers, dtype=torch.bfloat16)
    original = build_original(checkpoint, make_config(options), dtype=torch.bfloat16)
    work = make_work(original.builder, WorkShape(pairs=options.pairs)).first(1)
    original.load_pixels(work)
    (rollout,) = work.rollouts
    warm = dataclasses.replace(rollout, responses_a=rollout.responses_a[:1], responses_b=rollout.responses_b[:1])
    original.run(dataclasses.replace(work, rollouts=(warm,)))
    reset_peak_memory()
    runs = [original.run(work) for _ in range(2)]
    totals = [run["old"] + run["reference"] + run["update"] for run in runs]
    tokens = sum(prompt * len(rollout.responses_a) for prompt in rollout.prompt_tokens)
    tokens += sum(len(response.cot_ids) + 2 for response in rollout.responses)
    return {
        "pairs": 1,
        "tokens": tokens,
        "seconds": runs[totals.index(min(totals))],
        "runs": runs,
        "pairs_per_second": 1 / min(totals),
        "peak_memory_gib": peak_memory_gib(),
    }


def run_check(options: argparse.Namespace) -> dict:
    """Relative distance of gradients from the original's in fp32, over all trained weights together."""
    torch.backends.cudnn.allow_tf32 = False
    gradients, losses = {}, {}
    for name, dtype in (("fp32", torch.float32), ("original", torch.bfloat16)):
        checkpoint = make_checkpoint(options, layers=CHECK_LAYERS, dtype=dtype)
        original = build_original(checkpoint, make_config(options), dtype=dtype)
        work = make_work(original.builder, CHECK_SHAPE)
        original.load_pixels(work)
        losses[name] = original.run(work)["loss"]
        gradients[name] = {n: p.grad.float().cpu() for n, p in original.model.named_parameters() if p.grad is not None}
        del original
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    ours = Ours(options, layers=CHECK_LAYERS)
    ours.keep_gradients()
    losses["ours"] = ours.run(make_work(ours.runtime.builder, CHECK_SHAPE))["loss"]
    gradients["ours"] = ours.gradients
    truth = gradients["fp32"]
    assert all(gradients[name].keys() == truth.keys() for name in gradients)

    def distance(name: str) -> float:
        error = sum(float((gradients[name][key] - truth[key]).double().square().sum()) for key in truth)
        return (error / sum(float(value.double().square().sum()) for value in truth.values())) ** 0.5

    return {
        "layers": CHECK_LAYERS,
        "loss": losses,
        "gradient_distance_from_fp32": {name: distance(name) for name in ("original", "ours")},
    }


def run_growth(options: argparse.Namespace) -> dict[str, list[dict]]:
    """By axis, a row for each shape: seconds with kept activations, and the peak memory without."""
    ours = Ours(options, layers=options.layers)
    plan, growth = ours.runtime.activations, {}
    for axis, changes in GROWTH.items():
        growth[axis] = []
        for change in changes:
            work = make_work(ours.runtime.builder, WorkShape(**{"pairs": 1, **change}))
            plan.max_kept = len(plan.layers)
            ours.run(work)
            run = ours.run(work)
            row = {**change, "packed_tokens": count_packed_tokens(work), "kept_layers": plan.num_kept}
            row["seconds"] = {name: run[name] for name in PHASES}
            plan.max_kept = 0
            reset_peak_memory()
            ours.run(work)
            growth[axis].append({**row, "least_memory_gib": peak_memory_gib()})
            sys.stderr.write(f"{axis} {json.dumps(growth[axis][-1])}\n")
    return growth


PARTS = {"check": run_check, "ours": run_ours, "original": run_original, "growth": run_growth}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokenizer", default=str(TINY_BASE))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--no_compile", action="store_true", help="leave the layers as transformers has them")
    parser.add_argument("--tiny", action="store_true", help="small layers, to try the script")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_kept_layers", type=int, help="0: the least memory")
    parser.add_argument("--profile", type=Path, help="write the kernels of one pair's step here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["check", "ours", "original"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "descore_update_8b")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    result = {
        **describe_machine(),
        "model": f"Qwen3-VL-8B's shape ({options.layers} text layers), LoRA {options.lora_rank}, bf16, random weights",
        "work": dataclasses.asdict(WorkShape()),
    }
    for part, measured in run_parts(PARTS, options.parts, options, options.folder):
        result[part] = measured
        if {"ours", "original"} <= result.keys():
            result["speedup"] = result["ours"]["pairs_per_second"] / result["original"]["pairs_per_second"]
        write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
