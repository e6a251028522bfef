"""The update of stage 2 with a model of Qwen3-VL-8B's shape on one GPU: ours against the original's algorithm.

    python benchmarks/update_8b.py --output results/update_h100.json

Both get the same pairs (benchmarks/pairs.py) and weights, train LoRA and do all that follows the rollout: vision
features, old and reference log-probs, forward, backward; ours its optimizer step as well. Each runs in a process of
its own. `--tiny --layers 2 --pairs 2` tries the script on a CPU.

- ours: `ExperienceMaker` and `Learner`, as the trainer runs them.
- original: benchmarks/original.py.
- check: both again with few text layers, and the original in fp32: how far the gradients of each are from that.

benchmarks/growth_8b.py measures how ours grows with the work.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from original import LossSettings, OriginalUpdate
from pairs import Work, WorkShape, make_work
from result_file import write_result
from shapes import DEVICE, TERA, build_checkpoint, build_config, count_row_flops, count_vision_flops, measure_ceilings
from verl.config import Config
from verl.data.scored_sequence import SequenceBuilder
from verl.model.building import build_policy
from verl.model.flash_kernels import choose_kernels
from verl.model.policy import PolicyModel
from verl.model.reward_files import PolicyCheckpoint
from verl.workers.experience import ExperienceMaker
from verl.workers.learner import Learner
from verl.workers.model_setup import PolicyRuntime, build_runtime
from verl.workers.parallel import join_process_group
from verl.workers.rank_batch import RankBatch

GIB = 2**30
ADAPTER_STD = 0.01
PORT = 29511
CHECK_LAYERS = 4
CHECK_SHAPE = WorkShape(pairs=1, n=3, prompt_tokens=1300, response_tokens=(100, 300))


def make_config(options: argparse.Namespace) -> Config:
    """Settings of both; the learning rate is 0, so that every repetition starts from the same weights."""
    config = Config()
    actor = config.worker.actor
    actor.model.lora.rank, actor.model.lora.alpha = options.lora_rank, 2 * options.lora_rank
    actor.model.enable_compile = not options.no_compile
    actor.model.max_kept_layers = options.max_kept_layers
    actor.optim.lr = 0.0
    actor.max_grad_norm = 1e9
    return config


def make_checkpoint(options: argparse.Namespace, *, layers: int, dtype: torch.dtype) -> PolicyCheckpoint:
    config = build_config(options.tokenizer, layers=layers, is_tiny=options.tiny)
    checkpoint = build_checkpoint(options.tokenizer, {}, config, dtype=dtype)
    settings = make_config(options).worker.actor.model
    shapes = {name: p.shape for name, p in build_policy(checkpoint, settings).backbone.named_parameters()}
    shapes = {name.replace(".base_layer.", "."): shape for name, shape in shapes.items() if ".lora_" not in name}
    return build_checkpoint(options.tokenizer, shapes, config, dtype=dtype)


@torch.no_grad()
def fill_adapters(model: PolicyModel) -> None:
    """Give LoRA's B values, so that policy and reference differ."""
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_B." in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(std=ADAPTER_STD, generator=torch.Generator(DEVICE).manual_seed(len(name)))


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
        watch = PhaseWatch()
        with watch("vision"):
            self.experience.encode_vision(batch)
        with watch("reference"):
            batch.ref_log_probs = self.experience.ref_log_probs(batch)
        with watch("update"):
            metrics = self.learner.learn(batch, work.advantages, step=1, lr_factor=1.0)
        kept = self.runtime.activations.num_kept
        return {**watch.seconds, "loss": metrics["actor/loss"], "bt": metrics["bt/loss"], "kept_layers": kept}

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

    def row_flops(self, work: Work) -> dict[str, float]:
        """Operations of a step: executed ones by phase, and those of the update that are needed or are attention."""
        totals = dict.fromkeys(("vision", "reference", "update", "update_needed", "update_attention"), 0.0)
        config, rank = self.runtime.checkpoint.config, self.learner.config.worker.actor.model.lora.rank
        batch = RankBatch((work.rollouts,), work.rollouts[0], dict(work.prompts))
        num_layers = config.text_config.num_hidden_layers
        recomputed = 1 - self.runtime.activations.num_kept / num_layers
        for micro_batch in batch.split(work.rollouts, 1, count=len(work.rollouts)):
            packed = batch.pack(micro_batch, self.runtime.builder, torch.device("cpu"))
            flops = count_row_flops(packed, config, lora_rank=rank)
            totals["vision"] += sum(count_vision_flops(config, grid) for grid in packed.grid_thw)
            totals["reference"] += count_row_flops(packed, config).forward()
            totals["update"] += flops.lora_update(recomputed_share=recomputed)
            totals["update_needed"] += flops.lora_model()
            totals["update_attention"] += flops.attention_update(recomputed_share=recomputed)
        return totals


class PhaseWatch:
    """Seconds of phases, with the device idle at their bounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "PhaseWatch":
        self.name = name
        return self

    def __enter__(self) -> None:
        _synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _synchronize()
        self.seconds[self.name] = time.perf_counter() - self.start


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


def build_original(options: argparse.Namespace, *, layers: int, dtype: torch.dtype) -> OriginalUpdate:
    checkpoint = make_checkpoint(options, layers=layers, dtype=dtype)
    config = make_config(options)
    model = build_policy(checkpoint, config.worker.actor.model, frozen_dtype=dtype)
    model = materialize_whole(model, checkpoint, dtype)
    algorithm = config.algorithm
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    return OriginalUpdate(model, builder, LossSettings(config.worker.actor.bt_weight, algorithm.kl_coef))


def materialize_whole(model: PolicyModel, checkpoint: PolicyCheckpoint, dtype: torch.dtype) -> PolicyModel:
    """Put every parameter on the device, those of LoRA in `dtype` too, as the original trains them."""
    adapters = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            value = torch.zeros(parameter.shape)
        elif parameter.is_meta:
            value = checkpoint.weights[model.hub_name(name)]
        else:
            value = parameter.data
        fresh = torch.nn.Parameter(value.to(DEVICE), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, fresh)
        if ".lora_" in name:
            adapters[name] = fresh
    model.initialize_adapters(adapters)
    fill_adapters(model)
    for parameter in adapters.values():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(DEVICE))
    return model.train()


def run_original_step(original: OriginalUpdate, work: Work) -> dict[str, float]:
    original.model.zero_grad(set_to_none=True)
    watch = PhaseWatch()
    with watch("old"):
        old = original.log_probs(work)
    with watch("reference"), original.model.adapter_disabled():
        reference = original.log_probs(work)
    with watch("update"):
        loss = original.update(work, old, reference)
    return {**watch.seconds, "loss": loss}


def run_ours(options: argparse.Namespace) -> dict:
    ours = Ours(options, layers=options.layers)
    work = make_work(ours.runtime.builder, WorkShape(pairs=options.pairs))
    start = time.perf_counter()
    ours.run(work.first(2))
    compiled = time.perf_counter() - start
    ours.run(work)
    reset_peak()
    runs = [ours.run(work) for _ in range(options.repeats)]
    phases = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    flops = ours.row_flops(work)
    one = ours.run(work.first(1))
    result = {
        "pairs": options.pairs,
        "packed_tokens": sum(rollout.num_tokens for rollout in work.rollouts),
        "first_pass_seconds": compiled,
        "seconds": phases,
        "runs": runs,
        "pairs_per_second": options.pairs / (phases["vision"] + phases["reference"] + phases["update"]),
        "tflops_executed": {name: flops[name] / TERA / phases[name] for name in ("vision", "reference", "update")},
        "tflops_needed_by_update": flops["update_needed"] / TERA / phases["update"],
        "first_pair_loss": {"loss": one["loss"], "bt": one["bt"]},
        "text_attention": ours.text_attention,
        "peak_memory_gib": peak_gib(),
        "ceilings": measure_ceilings(),
    }
    if options.profile:
        profile(lambda: ours.run(work.first(1)), options.profile)
    return result


def profile(function, path: Path) -> None:
    """Write the kernels of a call, by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
    path.write_text(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))


def run_original(options: argparse.Namespace) -> dict:
    original = build_original(options, layers=options.layers, dtype=torch.bfloat16)
    work = make_work(original.builder, WorkShape(pairs=options.pairs)).first(1)
    original.load_pixels(work)
    warm = dataclasses.replace(work.rollouts[0], responses_a=work.rollouts[0].responses_a[:1])
    warm = dataclasses.replace(warm, responses_b=work.rollouts[0].responses_b[:1])
    run_original_step(original, dataclasses.replace(work, rollouts=(warm,)))
    reset_peak()
    runs = [run_original_step(original, work) for _ in range(2)]
    phases = min(runs, key=lambda run: run["old"] + run["reference"] + run["update"])  # the faster of both
    tokens = sum(prompt * len(work.rollouts[0].responses_a) for prompt in work.rollouts[0].prompt_tokens)
    tokens += sum(len(response.cot_ids) + 2 for response in work.rollouts[0].responses)
    return {
        "pairs": 1,
        "tokens": tokens,
        "seconds": phases,
        "runs": runs,
        "pairs_per_second": 1 / (phases["old"] + phases["reference"] + phases["update"]),
        "peak_memory_gib": peak_gib(),
    }


def run_check(options: argparse.Namespace) -> dict:
    """Relative distance of gradients from the original's in fp32, over all trained weights together."""
    torch.backends.cudnn.allow_tf32 = False
    gradients, losses = {}, {}
    for name, dtype in (("fp32", torch.float32), ("original", torch.bfloat16)):
        original = build_original(options, layers=CHECK_LAYERS, dtype=dtype)
        work = make_work(original.builder, CHECK_SHAPE)
        original.load_pixels(work)
        losses[name] = run_original_step(original, work)["loss"]
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


PARTS = {"check": run_check, "ours": run_ours, "original": run_original}


def make_parser(description: str) -> argparse.ArgumentParser:
    """Flags that say which model and settings are measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokenizer", default="../cold_start/model/tiny_base")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--no_compile", action="store_true", help="leave the layers as transformers has them")
    parser.add_argument("--tiny", action="store_true", help="small layers, to try the script")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_kept_layers", type=int, help="0: the least memory")
    parser.add_argument("--profile", type=Path, help="write the kernels of one pair's step here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--one_part", choices=PARTS, help="run this part in this process")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "descore_update_8b")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one_part:
        (options.folder / f"{options.one_part}.json").write_text(json.dumps(PARTS[options.one_part](options)))
        os._exit(0)  # compilation's worker processes would hold the exit up
    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "torch": torch.__version__,
        "model": f"Qwen3-VL-8B's shape ({options.layers} text layers), LoRA {options.lora_rank}, bf16, random weights",
        "work": dataclasses.asdict(WorkShape()),
    }
    for part in options.parts:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one_part", part], check=True)
        result[part] = json.loads((options.folder / f"{part}.json").read_text())
        if {"ours", "original"} <= result.keys():
            result["speedup"] = result["ours"]["pairs_per_second"] / result["original"]["pairs_per_second"]
        write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
