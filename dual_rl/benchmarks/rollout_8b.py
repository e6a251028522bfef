"""Rollouts with a model of Qwen3-VL-8B's shape and random weights: seconds, tokens a second, time a decode step.

    PYTHONPATH=. python benchmarks/rollout_8b.py --output results/rollout_h100.json quantization=fp8
    PYTHONPATH=. python benchmarks/rollout_8b.py --profile shared_prompt_decoding=false

Last come fields of `RolloutConfig`. Two works over the same video prompts: `drawn`, where responses end when the
random weights draw the end (at most 1,000 tokens, some 600 on average), and `fixed`, where all responses have 600.
`--profile` adds what decode steps are made of. `--keep` writes what was drawn in two compositions of the batch, and
`--compare` tells two such files apart, next to what the composition alone does.
"""

import argparse
import cProfile
import dataclasses
import io
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml

from harness import (
    DEVICE,
    TINY_BASE,
    clock,
    describe_machine,
    exit_at_once,
    make_parser,
    measure_ceilings,
    synchronize,
    write_result,
)
from pairs import WorkShape, make_work
from shapes import build_checkpoint, build_config
from verl.config import RolloutConfig
from verl.data.scored_sequence import SequenceBuilder, forbidden_token_ids
from verl.model.reward_files import save_engine_folder
from verl.rollout.engine import RolloutEngine, build_engine
from verl.types import Sampling, VideoPrompt

LONGEST, FIXED = 1000, 600
MAX_MODEL_LEN = 5096
PROFILED = 40
"""Decode steps in a profile."""


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokenizer", default=str(TINY_BASE))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--works", nargs="*", default=["drawn", "fixed"])
    parser.add_argument("--tokens", type=int, default=LONGEST, help="longest response of `drawn`")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("settings", nargs="*", help="fields of RolloutConfig, key=value")
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[RolloutEngine, SequenceBuilder, list[VideoPrompt]]:
    """The engine with its weights, what encodes prompts, and the prompts."""
    config = build_config(options.tokenizer, is_tiny=options.tiny)
    checkpoint = build_checkpoint(options.tokenizer, config, dtype=torch.bfloat16)
    folder = Path(tempfile.mkdtemp())
    save_engine_folder(folder, checkpoint, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    settings = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in options.settings)}
    engine = build_engine(
        folder,
        config=RolloutConfig(n=options.n, **settings),
        max_model_len=MAX_MODEL_LEN,
        forbidden_token_ids=forbidden_token_ids(checkpoint.processor, config.text_config.vocab_size),
        eos_token_id=checkpoint.processor.tokenizer.eos_token_id,
        device=torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"),
    )
    engine.load_weights(checkpoint.weights.items())
    shape = WorkShape(pairs=options.pairs, n=1, **({"prompt_tokens": 300, "side": 64} if options.tiny else {}))
    builder = SequenceBuilder(checkpoint.processor)
    return engine, builder, list(make_work(builder, shape).prompts.values())


def run(engine: RolloutEngine, prompts: list[VideoPrompt], sampling: Sampling) -> dict:
    """One set of rollouts, timed."""
    timed: dict[str, float] = {}
    with clock(timed, "seconds"):
        responses = [response for group in engine.generate(prompts, sampling) for response in group]
    lengths = [response.num_labels for response in responses]
    engine.llm.reset_prefix_cache()
    return {
        **timed,
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / timed["seconds"],
        "mean_length": statistics.mean(lengths),
        "longest": max(lengths),
        "log_prob_mean": float(torch.cat([response.log_probs for response in responses]).mean()),
    }


def profile(engine: RolloutEngine, prompts: list[VideoPrompt], sampling: Sampling) -> dict:
    """Kernels and host functions of decode steps with all responses under way, in milliseconds a step."""
    step, seconds = engine.llm.llm_engine.step, []
    device = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    host = cProfile.Profile()
    first, second = 60, 60 + 2 * PROFILED

    def watched():
        number = len(seconds)
        if number == first:
            device.start()
        if number == second:
            host.enable()
        start = time.perf_counter()
        outputs = step()
        seconds.append(time.perf_counter() - start)
        if number == first + PROFILED - 1:
            synchronize()
            device.stop()
        if number == second + PROFILED - 1:
            host.disable()
        return outputs

    engine.llm.llm_engine.step = watched
    try:
        engine.generate(prompts, dataclasses.replace(sampling, max_tokens=300))
    finally:
        del engine.llm.llm_engine.step
    events = sorted(device.key_averages(), key=lambda event: -event.self_device_time_total)
    text = io.StringIO()
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(45)
    return {
        "ms_by_step": [round(1e3 * value, 2) for value in seconds],
        "kernels": [
            (round(event.self_device_time_total / 1e3 / PROFILED, 4), event.count / PROFILED, event.key[:100])
            for event in events[:40]
        ],
        "kernels_ms": sum(event.self_device_time_total for event in events) / 1e3 / PROFILED,
        "host": [line for line in text.getvalue().splitlines() if line.strip()],
    }


def draw_twice(engine: RolloutEngine, prompts: list[VideoPrompt], sampling: Sampling) -> list[list[tuple]]:
    """Ids and log-probs of short responses, with all prompts in one batch and with a quarter of them at a time."""
    sampling = dataclasses.replace(sampling, max_tokens=64)
    quarter = max(1, len(prompts) // 4)
    whole = engine.generate(prompts, sampling)
    parts = [engine.generate(prompts[i : i + quarter], sampling) for i in range(0, len(prompts), quarter)]
    batches = whole, [group for part in parts for group in part]
    return [[(r.cot_ids, r.log_probs) for group in batch for r in group] for batch in batches]


def compare(ours: list[tuple], others: list[tuple]) -> dict:
    """Log-probs of two drawings of the same, up to the first token that differs in each response."""
    differences, lengths = [], []
    for (ids, log_probs), (other_ids, other_log_probs) in zip(ours, others, strict=True):
        pairs = enumerate(zip(ids, other_ids, strict=False))
        length = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(other_ids)))
        lengths.append(length)
        differences.append((log_probs[:length] - other_log_probs[:length]).abs())
    differences = torch.cat(differences)
    quantiles = {f"p{q}": float(differences.quantile(q / 100)) for q in (50, 99)}
    return {"tokens": len(differences), "mean_length": statistics.mean(lengths), **quantiles}


def measure_work(engine: RolloutEngine, prompts: list[VideoPrompt], sampling: Sampling, repeats: int) -> dict:
    """Seconds of reading the prompts alone, and runs with seeds 0, 1, ..."""
    run(engine, prompts, dataclasses.replace(sampling, max_tokens=32))
    prefill = [run(engine, prompts, dataclasses.replace(sampling, max_tokens=1))["seconds"] for _ in range(2)]
    runs = [run(engine, prompts, dataclasses.replace(sampling, seed=seed)) for seed in range(repeats)]
    return {"prefill_seconds": min(prefill), "runs": runs}


def main() -> None:
    options = parse_arguments()
    if options.compare:
        (first, again), (second, _) = (torch.load(path, weights_only=True) for path in options.compare)
        result = {"batch_alone": compare(first, again), "first_and_second": compare(first, second)}
        return write_result(result, options.output)
    result = {**describe_machine(), "settings": options.settings, "works": {}}
    with clock(result, "start_seconds"):
        engine, builder, prompts = build(options)
    result["prompt_tokens"] = [prompt.input_ids.numel() for prompt in prompts]
    for work in options.works:
        if work == "fixed":
            engine.eos_token_id = builder.reward_token_id  # which is never drawn
        length = FIXED if work == "fixed" else options.tokens
        sampling = Sampling(n=options.n, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=length, seed=1)
        result["works"][work] = measure_work(engine, prompts, sampling, options.repeats)
        write_result(result, options.output)
        if options.profile:
            result["works"][work]["profile"] = profile(engine, prompts, sampling)
        if options.keep and work == options.works[0]:
            torch.save(draw_twice(engine, prompts, sampling), options.keep)
    write_result(result | measure_ceilings(), options.output)
    exit_at_once()


if __name__ == "__main__":
    main()
