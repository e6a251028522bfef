"""Scoring videos with a model of Qwen3-VL-8B's shape: one engine against the original's scheme, in one run.

    python benchmarks/score_8b.py --work /tmp/work --output results/score_h100.json

`--work` is what benchmarks/make_work.py wrote. Both schemes score the same videos, each with a chain of thought of its
own drawn length (200 to 1,000 tokens): the weights are random and would never end one.

- one engine: `RewardModel`, as `inference.py` uses it.
- original: vLLM writes for a batch of videos; then a second copy of the model in torch, one video after the other,
  decodes it again and runs prompt and thought through vision tower, language model and language head, and a head in
  bf16 reads the last state.

Each scheme runs in a process of its own. A third computes, in fp32, the rewards of some of the thoughts that both
wrote, and so how far each scheme's are from the truth.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from result_file import write_result
from scoring.hf_scorer import HfScorer
from scoring.reward_model import RewardModel
from scoring.types import ScoringSettings, VideoTask
from scoring.vllm_scorer import VllmScorer
from verl.config import DataConfig, RolloutConfig
from verl.data.loading import VideoLoader
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import SequenceBuilder
from verl.model.reward_files import load_checkpoint, save_engine_folder, stream_weights
from verl.rollout.vllm_prompts import PromptForm
from verl.rollout.vllm_start import prepare_environment, start_llm
from verl.types import VideoKey

GIB = 2**30
SHORTEST, LONGEST = 200, 1000
MAX_MODEL_LEN = 6144
NUM_CHECKED = 16
CUDA = torch.device("cuda")


def read_tasks(work: Path, count: int) -> list[VideoTask]:
    """The first `count` videos of the work."""
    pairs = read_pairs(work / "train.csv", DataConfig(train_files=str(work / "train.csv")))
    tasks = [
        VideoTask(f"{pair.pair_id}{n}", video, pair.problem) for pair in pairs for n, video in enumerate(pair.videos)
    ]
    assert len(tasks) >= count, f"{work} has {len(tasks)} videos, {count} are asked for"
    return tasks[:count]


def draw_lengths(tasks: Sequence[VideoTask]) -> dict[str, int]:
    """Tokens of each task's chain of thought, the same for both schemes."""
    draws = random.Random(0)
    return {task.name: draws.randint(SHORTEST, LONGEST) for task in tasks}


class FixedLengthScorer(VllmScorer):
    """The engine, with a chain of thought of the given length for each task."""

    lengths: dict[str, int]

    def thinking_parameters(self, name: str):
        """See `VllmScorer`; the end of the sequence is nothing special."""
        parameters = super().thinking_parameters(name)
        parameters.max_tokens = parameters.min_tokens = self.lengths[name]
        return parameters


def run_one_engine(options: argparse.Namespace) -> dict:
    """Videos per second at several numbers of videos in flight, with one engine and one set of weights."""
    tasks = read_tasks(options.work, options.videos)
    settings = ScoringSettings(batch_size=max(options.batch_sizes), max_new_tokens=LONGEST, num_threads=8)
    settings = dataclasses.replace(settings, max_prompt_length=MAX_MODEL_LEN - LONGEST - 2)
    torch.cuda.reset_peak_memory_stats()
    import scoring.vllm_scorer as module

    module.VllmScorer = FixedLengthScorer
    FixedLengthScorer.lengths = draw_lengths(tasks)
    model = RewardModel.from_pretrained(options.work / "model", settings=settings)
    engine_step, kept = model.engine.step, {}

    def step():
        ready = engine_step()
        kept.update(ready)
        return ready

    model.engine.step = step
    list(model.score_stream(tasks[:4]))
    runs = {}
    for batch_size in options.batch_sizes:
        model.settings = dataclasses.replace(settings, batch_size=batch_size)
        model.engine.llm.reset_prefix_cache()
        model.engine.cached_tokens = model.engine.prompt_tokens = 0
        torch.cuda.synchronize()
        start = time.perf_counter()
        outcomes = list(model.score_stream(tasks))
        seconds = time.perf_counter() - start
        runs[batch_size] = {
            "seconds": seconds,
            "videos_per_second": len(tasks) / seconds,
            "share_of_scoring_tokens_cached": model.engine.cached_tokens / model.engine.prompt_tokens,
        }
        assert len(outcomes) == len(tasks)
        assert all(hasattr(outcome, "reward") for outcome in outcomes), outcomes
    checked = {
        task.name: {"ids": kept[task.name].cot_ids, "reward": kept[task.name].reward} for task in tasks[:NUM_CHECKED]
    }
    weights = model.engine.llm.collective_rpc(_weight_bytes)[0]
    free, total = torch.cuda.mem_get_info()
    return {"runs": runs, "weights_gib": weights / GIB, "memory_gib": (total - free) / GIB, "checked": checked}


def _weight_bytes(worker) -> int:
    return sum(p.numel() * p.element_size() for p in worker.model_runner.model.parameters())


def run_original(options: argparse.Namespace) -> dict:
    """vLLM for a batch, then torch for each of its videos; heads and all states in bf16."""
    tasks, batch_size = read_tasks(options.work, options.videos), min(options.batch_sizes)
    lengths = draw_lengths(tasks)
    checkpoint = load_checkpoint(options.work / "model", with_weights=False)
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        options.work / "model", dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(CUDA)
    head = checkpoint.head_weight.to(CUDA, torch.bfloat16)
    torch_weights = sum(p.numel() * p.element_size() for p in model.parameters())
    files = tempfile.TemporaryDirectory()
    config = RolloutConfig(gpu_memory_utilization=0.6, max_num_seqs=batch_size)
    save_engine_folder(Path(files.name), checkpoint, dtype=torch.bfloat16)
    prepare_environment(config, CUDA)
    llm = start_llm(Path(files.name), config, MAX_MODEL_LEN, [], CUDA, logprobs_mode="raw_logprobs")
    weights = stream_weights(options.work / "model", checkpoint, dtype=torch.bfloat16)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    form = PromptForm(Path(files.name), llm.get_tokenizer(), torch.device("cpu"))
    from vllm import SamplingParams

    def read_prompt(request: dict) -> Sequence[int]:
        return llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids

    def think(batch: Sequence[VideoTask], loader: VideoLoader) -> list[tuple[int, ...]]:
        prompts = [loader.submit(VideoKey(n, "A"), task.problem, task.video).result() for n, task in enumerate(batch)]
        form.learn(prompts[0], read_prompt)
        requests = [form.request(prompt, video_id=task.name) for prompt, task in zip(prompts, batch, strict=True)]
        parameters = [
            SamplingParams(
                temperature=0,
                repetition_penalty=1.05,
                max_tokens=lengths[task.name],
                min_tokens=lengths[task.name],
                ignore_eos=True,
            )
            for task in batch
        ]
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(requests, parameters, use_tqdm=False)]

    @torch.no_grad()
    def score(task: VideoTask, ids: tuple[int, ...], loader: VideoLoader) -> float:
        prompt = loader.submit(VideoKey(0, "A"), task.problem, task.video).result()
        row = torch.cat([prompt.input_ids, torch.tensor([*ids, builder.reward_token_id])])[None].to(CUDA)
        output = model(
            input_ids=row,
            mm_token_type_ids=(row == builder.processor.video_token_id).int() * 2,
            pixel_values_videos=builder.pixel_values(prompt).to(CUDA, torch.bfloat16),
            video_grid_thw=torch.tensor([prompt.grid_thw], device=CUDA),
            output_hidden_states=True,
            use_cache=False,
        )
        return float(output.hidden_states[-1][0, -1] @ head[0])

    with VideoLoader(builder, checkpoint.video_budget, num_threads=1) as loader:
        for task, ids in zip(tasks[:2], think(tasks[:2], loader), strict=True):
            score(task, ids, loader)
        llm.reset_prefix_cache()
        torch.cuda.synchronize()
        start, thinking, rewards, written = time.perf_counter(), 0.0, {}, {}
        for first in range(0, len(tasks), batch_size):
            batch, begin = tasks[first : first + batch_size], time.perf_counter()
            thoughts = think(batch, loader)
            thinking += time.perf_counter() - begin
            for task, ids in zip(batch, thoughts, strict=True):
                rewards[task.name], written[task.name] = score(task, ids, loader), ids
        seconds = time.perf_counter() - start
    free, total = torch.cuda.mem_get_info()
    return {
        "batch_size": batch_size,
        "seconds": seconds,
        "videos_per_second": len(tasks) / seconds,
        "seconds_thinking": thinking,
        "weights_gib": (torch_weights + llm.collective_rpc(_weight_bytes)[0]) / GIB,
        "memory_gib": (total - free) / GIB,
        "checked": {
            task.name: {"ids": written[task.name], "reward": rewards[task.name]} for task in tasks[:NUM_CHECKED]
        },
    }


def compute_truth(options: argparse.Namespace) -> dict:
    """Mean and largest distance of each scheme's rewards from those in fp32, over the thoughts that it wrote."""
    tasks = read_tasks(options.work, NUM_CHECKED)
    checkpoint = load_checkpoint(options.work / "model", with_weights=False)
    settings = ScoringSettings(backend="hf", precision="fp32", batch_size=1)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        save_engine_folder(Path(folder), checkpoint, dtype=torch.float32)
        builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
        scorer = HfScorer(
            Path(folder),
            checkpoint,
            settings,
            forbidden_token_ids=[],
            reward_token_id=builder.reward_token_id,
            max_model_len=MAX_MODEL_LEN,
            device=CUDA,
        )
        scorer.load_weights(stream_weights(options.work / "model", checkpoint, dtype=torch.float32))
        with VideoLoader(builder, checkpoint.video_budget) as loader:
            prompts = [loader.submit(VideoKey(n, "A"), t.problem, t.video).result() for n, t in enumerate(tasks)]
        for name in ("one_engine", "original"):
            checked = json.loads((options.parts / f"{name}.json").read_text())["checked"]
            truth = [
                scorer.compute_rewards([prompt], [tuple(checked[task.name]["ids"])])[0]
                for prompt, task in zip(prompts, tasks, strict=True)
            ]
            errors = [abs(checked[task.name]["reward"] - true) for task, true in zip(tasks, truth, strict=True)]
            result[name] = {
                "mean_error": statistics.fmean(errors),
                "max_error": max(errors),
                "spread_of_true_rewards": statistics.stdev(truth),
            }
    return result


def compare_schemes(ours: Mapping, original: Mapping) -> dict[str, float]:
    """Videos a second over the original's, at our best batch size and at theirs; weights on the device over theirs."""
    speeds = {size: run["videos_per_second"] for size, run in ours["runs"].items()}
    same = speeds.get(str(original["batch_size"]))
    return {
        "speedup": max(speeds.values()) / original["videos_per_second"],
        **({"speedup_at_equal_batch_size": same / original["videos_per_second"]} if same else {}),
        "weights_ratio": ours["weights_gib"] / original["weights_gib"],
    }


PARTS = {"one_engine": run_one_engine, "original": run_original, "truth": compute_truth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--parts", type=Path, default=Path(tempfile.gettempdir()) / "descore_score_8b")
    parser.add_argument("--part", choices=PARTS, help="run one part only, in this process")
    options = parser.parse_args()
    options.parts.mkdir(parents=True, exist_ok=True)
    if options.part:
        (options.parts / f"{options.part}.json").write_text(json.dumps(PARTS[options.part](options)))
        return
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": "Qwen3-VL-8B's shape, bf16, random weights",
        "videos": options.videos,
        "cot_tokens": [SHORTEST, LONGEST],
    }
    for name in PARTS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name], check=True)
        result[name] = json.loads((options.parts / f"{name}.json").read_text())
        result[name].pop("checked", None)
        if {"one_engine", "original"} <= result.keys():
            result |= compare_schemes(result["one_engine"], result["original"])
        write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
