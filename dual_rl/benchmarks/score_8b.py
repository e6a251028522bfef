"""Scoring videos with a model of Qwen3-VL-8B's shape: one engine against the original's scheme, in one run.

    python benchmarks/score_8b.py --work /tmp/work --output results/score_h100.json

`--work` is what benchmarks/make_work.py wrote. Both schemes score the same videos, each with a chain of thought of its
own drawn length (200 to 1,000 tokens): the weights are random and would never end one.

- one engine: `RewardModel`, as `inference.py` uses it.
- fp8: the same with FP8 weights and cache. Its rewards without a thought, where the sequences are the same, are
  compared with those of one_engine, if that part has been run.
- thoughts: seconds for one thought a video, and for eight drawn ones.
- original: vLLM writes for a batch of videos; then a second copy of the model in torch, one video after the other,
  decodes it again and runs prompt and thought through vision tower, language model and language head, and a head in
  bf16 reads the last state.

Each part runs in a process of its own. The last computes, in fp32, the rewards of some of the thoughts that the
schemes wrote, and so the error of each scheme's rewards. `--memory_gib` shows what fits on a smaller card. A part with
one batch size should take about two minutes:

    python benchmarks/score_8b.py --work /tmp/work --part fp8 --batch_sizes 128 --memory_gib 24 --output fp8_24gib.json
"""

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

from harness import GIB, clock, describe_machine, make_parser, run_parts, write_result
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
from verl.types import VideoKey, VideoPrompt

SHORTEST, LONGEST = 200, 1000
MAX_MODEL_LEN = 6144
NUM_CHECKED = 16
NUM_COMPARED, NUM_THINKING = 64, 32
"""Videos for the agreement of FP8 with bf16, and for the cost of several thoughts."""
NUM_THOUGHTS = 8
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
    """The engine, with chains of thought of the given length for each task."""

    lengths: dict[str, int]

    def thinking_parameters(self, request):
        """See `VllmScorer`; the end of the sequence is nothing special."""
        parameters = super().thinking_parameters(request)
        parameters.max_tokens = parameters.min_tokens = self.lengths[request.name]
        return parameters


def load_one_engine(
    options: argparse.Namespace, lengths: dict[str, int], **changes: object
) -> tuple[RewardModel, dict]:
    """The model, and the thoughts and rewards of its engine by name of the video, as they come."""
    import scoring.vllm_scorer as module

    module.VllmScorer, FixedLengthScorer.lengths = FixedLengthScorer, lengths
    settings = ScoringSettings(
        batch_size=max(options.batch_sizes),
        max_new_tokens=LONGEST,
        num_threads=8,
        max_prompt_length=MAX_MODEL_LEN - LONGEST - 2,
        **changes,
    )
    if options.memory_gib is not None:
        share = options.memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        settings = dataclasses.replace(settings, gpu_memory_utilization=share)
    model = RewardModel.from_pretrained(options.work / "model", settings=settings)
    engine_step, ready = model.engine.step, {}

    def step():
        done = engine_step()
        ready.update(done)
        return done

    model.engine.step = step
    return model, ready


def run_one_engine(options: argparse.Namespace, **changes: object) -> dict:
    """Videos per second at several numbers of videos in flight, with one engine and one set of weights."""
    tasks = read_tasks(options.work, options.videos)
    model, ready = load_one_engine(options, draw_lengths(tasks), **changes)
    list(model.score_stream(tasks[:4]))
    runs = {}
    for batch_size in options.batch_sizes:
        model.settings = dataclasses.replace(model.settings, batch_size=batch_size)
        model.engine.llm.reset_prefix_cache()
        model.engine.cached_tokens = model.engine.prompt_tokens = 0
        run = runs[batch_size] = {}
        with clock(run, "seconds"):
            outcomes = list(model.score_stream(tasks))
        run["videos_per_second"] = len(tasks) / run["seconds"]
        run["share_of_scoring_tokens_cached"] = model.engine.cached_tokens / model.engine.prompt_tokens
        assert len(outcomes) == len(tasks)
        assert all(hasattr(outcome, "reward") for outcome in outcomes), outcomes
    scores = {task.name: ready[task.name][0] for task in tasks[:NUM_CHECKED]}
    without = model.score_stream([dataclasses.replace(task, num_thoughts=0) for task in tasks[:NUM_COMPARED]])
    cache = model.engine.llm.llm_engine.vllm_config.cache_config
    return {
        "runs": runs,
        **measure_memory(model.engine.llm),
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "without_thought": {outcome.name: outcome.reward for outcome in without},
        "checked": {name: {"ids": score.cot_ids, "reward": score.reward} for name, score in scores.items()},
    }


def run_fp8(options: argparse.Namespace) -> dict:
    """The same in FP8, and how its rewards agree with those in bf16."""
    result = run_one_engine(options, quantization="fp8", kv_cache_dtype="fp8")
    path = options.parts / "one_engine.json"
    if path.is_file():
        ours, theirs = result["without_thought"], json.loads(path.read_text())["without_thought"]
        differences = [abs(reward - theirs[name]) for name, reward in ours.items()]
        first = [name for name in ours if name.endswith("0") and f"{name[:-1]}1" in ours]
        margins = [(ours[name] - ours[f"{name[:-1]}1"], theirs[name] - theirs[f"{name[:-1]}1"]) for name in first]
        result["agreement_with_bf16"] = {
            "correlation": statistics.correlation(list(ours.values()), [theirs[name] for name in ours]),
            "mean_difference": statistics.fmean(differences),
            "spread_in_bf16": statistics.stdev(theirs.values()),
            "same_verdicts": statistics.fmean(one * other > 0 for one, other in margins),
        }
    return result


def run_thoughts(options: argparse.Namespace) -> dict:
    """Seconds for the same videos with one thought, and with several that share the prompt's cache."""
    tasks, result = read_tasks(options.work, NUM_THINKING), {"videos": NUM_THINKING}
    model, _ = load_one_engine(options, draw_lengths(tasks), num_thoughts=NUM_THOUGHTS)
    list(model.score_stream(tasks[:2]))
    for count in (1, NUM_THOUGHTS):
        with clock(result, f"seconds_with_{count}"):
            outcomes = list(model.score_stream([dataclasses.replace(task, num_thoughts=count) for task in tasks]))
        assert all(hasattr(outcome, "reward") for outcome in outcomes), outcomes
    return result


def measure_memory(llm, *, other_bytes: int = 0) -> dict[str, float]:
    """GiB of weights, those of the engine and `other_bytes` beside, and of all that is taken on the device."""
    free, total = torch.cuda.mem_get_info()
    weights = llm.collective_rpc(_weight_bytes)[0] + other_bytes
    return {"weights_gib": weights / GIB, "memory_gib": (total - free) / GIB}


def _weight_bytes(worker) -> int:
    return sum(p.numel() * p.element_size() for p in worker.model_runner.model.parameters())


class OriginalScheme:
    """vLLM writes for a batch; torch scores each of its videos. Heads and all states are in bf16."""

    def __init__(self, folder: Path, engine_folder: Path, batch_size: int) -> None:
        checkpoint = load_checkpoint(folder, with_weights=False)
        self.builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
        self.loader = VideoLoader(self.builder, checkpoint.video_budget, num_threads=1)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).to(CUDA)
        self.head = checkpoint.head_weight.to(CUDA, torch.bfloat16)
        config = RolloutConfig(gpu_memory_utilization=0.6, max_num_seqs=batch_size)
        save_engine_folder(engine_folder, checkpoint, dtype=torch.bfloat16)
        prepare_environment(config, CUDA)
        self.llm = start_llm(engine_folder, config, MAX_MODEL_LEN, [], CUDA, logprobs_mode="raw_logprobs")
        weights = stream_weights(folder, checkpoint, dtype=torch.bfloat16)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.form = PromptForm(engine_folder, self.llm.get_tokenizer(), torch.device("cpu"))

    def think(self, batch: Sequence[VideoTask], lengths: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Token ids of the thoughts."""
        from vllm import SamplingParams

        def parameters(length: int) -> SamplingParams:
            limits = {"max_tokens": length, "min_tokens": length, "ignore_eos": True}
            return SamplingParams(temperature=0, repetition_penalty=1.05, **limits)

        prompts = [self.load(task, number) for number, task in enumerate(batch)]
        self.form.learn(prompts[0], self.llm)
        requests = [self.form.request(prompt, video_id=task.name) for prompt, task in zip(prompts, batch, strict=True)]
        chosen = [parameters(lengths[task.name]) for task in batch]
        return [tuple(output.outputs[0].token_ids) for output in self.llm.generate(requests, chosen, use_tqdm=False)]

    @torch.no_grad()
    def score(self, task: VideoTask, ids: tuple[int, ...]) -> float:
        """The reward after a thought."""
        prompt = self.load(task, 0)
        row = torch.cat([prompt.input_ids, torch.tensor([*ids, self.builder.reward_token_id])])[None].to(CUDA)
        output = self.model(
            input_ids=row,
            mm_token_type_ids=(row == self.builder.processor.video_token_id).int() * 2,
            pixel_values_videos=self.builder.pixel_values(prompt).to(CUDA, torch.bfloat16),
            video_grid_thw=torch.tensor([prompt.grid_thw], device=CUDA),
            output_hidden_states=True,
            use_cache=False,
        )
        return float(output.hidden_states[-1][0, -1] @ self.head[0])

    def load(self, task: VideoTask, number: int) -> VideoPrompt:
        return self.loader.submit(VideoKey(number, "A"), task.problem, task.video).result()


def run_original(options: argparse.Namespace) -> dict:
    """Videos per second at the smallest number of videos in flight."""
    tasks, batch_size = read_tasks(options.work, options.videos), min(options.batch_sizes)
    lengths, timed, thinking, checked = draw_lengths(tasks), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        scheme = OriginalScheme(options.work / "model", Path(folder), batch_size)
        with scheme.loader:
            for task, ids in zip(tasks[:2], scheme.think(tasks[:2], lengths), strict=True):
                scheme.score(task, ids)
            scheme.llm.reset_prefix_cache()
            with clock(timed, "seconds"):
                for first in range(0, len(tasks), batch_size):
                    batch = tasks[first : first + batch_size]
                    with clock(thinking, batch[0].name):
                        thoughts = scheme.think(batch, lengths)
                    for task, ids in zip(batch, thoughts, strict=True):
                        checked[task.name] = {"ids": ids, "reward": scheme.score(task, ids)}
        torch_bytes = sum(p.numel() * p.element_size() for p in scheme.model.parameters())
        return {
            "batch_size": batch_size,
            **timed,
            "videos_per_second": len(tasks) / timed["seconds"],
            "seconds_thinking": sum(thinking.values()),
            **measure_memory(scheme.llm, other_bytes=torch_bytes),
            "checked": {task.name: checked[task.name] for task in tasks[:NUM_CHECKED]},
        }


def compute_truth(options: argparse.Namespace) -> dict:
    """Mean and largest distance of each scheme's rewards from those in fp32, over the thoughts that it wrote."""
    tasks = read_tasks(options.work, NUM_CHECKED)
    checkpoint = load_checkpoint(options.work / "model", with_weights=False)
    settings = ScoringSettings(backend="hf", precision="fp32", batch_size=1, max_prompt_length=MAX_MODEL_LEN)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        save_engine_folder(Path(folder), checkpoint, dtype=torch.float32)
        builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
        scorer = HfScorer(Path(folder), checkpoint, settings, CUDA)
        scorer.load_weights(stream_weights(options.work / "model", checkpoint, dtype=torch.float32))
        with VideoLoader(builder, checkpoint.video_budget) as loader:
            prompts = [loader.submit(VideoKey(n, "A"), t.problem, t.video).result() for n, t in enumerate(tasks)]
        for name in ("one_engine", "fp8", "original"):
            if not (options.parts / f"{name}.json").is_file():
                continue
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


PARTS = {
    "one_engine": run_one_engine,
    "fp8": run_fp8,
    "thoughts": run_thoughts,
    "original": run_original,
    "truth": compute_truth,
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--memory_gib", type=float, help="of the card that one engine may use; default: 90%%")
    parser.add_argument("--parts", type=Path, default=Path(tempfile.gettempdir()) / "descore_score_8b")
    parser.add_argument("--part", choices=PARTS, help="run one part only; its result stays in the folder --parts")
    options = parser.parse_args()
    result = {
        **describe_machine(),
        "model": "Qwen3-VL-8B's shape, bf16, random weights",
        "videos": options.videos,
        "cot_tokens": [SHORTEST, LONGEST],
        **({} if options.memory_gib is None else {"memory_limit_gib": options.memory_gib}),
    }
    for name, measured in run_parts(PARTS, [options.part] if options.part else PARTS, options, options.parts):
        for raw in ("checked", "without_thought"):
            measured.pop(raw, None)
        result[name] = measured
        if {"one_engine", "original"} <= result.keys():
            result |= compare_schemes(result["one_engine"], result["original"])
        write_result(result, options.output)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
