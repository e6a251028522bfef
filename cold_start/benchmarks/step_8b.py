"""A training step of stage 1 with a model of Qwen3-VL-8B's shape on one GPU: ours against the original's algorithm.

    cd cold_start && PYTHONPATH=. python benchmarks/step_8b.py --output benchmarks/results/step_h100.json

Both get the same pairs and random weights, adapt the language model with LoRA, tune the vision tower, and take one
pair at a time, four per step. Each runs in a process of its own. `--tiny` tries the script on a CPU.

- ours: DeepSpeed (ZeRO-0, one process shares nothing) and `RewardTrainer`, as train.sh runs them.
- original: separate forward passes for A and B through stock transformers, with unused vocabulary logits at every
  position, everything in bf16. Rebuilt generously: no padding, flash attention, no DeepSpeed, and no copy of the
  embedding for the one row that is trained.
- check: both with few text layers, and the original in fp32: how far the gradients of each are from that.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arguments import DataArguments, ModelArguments, TrainingArguments
from attention import use_packed_attention
from data import EncodedPair, PairBatch, PairDataset
from engine import build_engine, compile_and_plan_activations, init_distributed
from flash_kernels import choose_kernels
from losses import PairLabels, compute_means, compute_pair_loss
from model_qwen3 import RewardModel, add_reward_token, prepare_for_training
from preference_csv import Judgement
from scored_sequence import ScoredSequence, SequenceBuilder
from shapes import DEVICE, GIB, TERA, build_config, count_pair_flops, measure_ceilings, randomize
from trainer_qwen3 import RewardTrainer
from vision_process import VideoBudget, VideoFrames

STAGE_DIR = Path(__file__).resolve().parents[1]
TINY_BASE = STAGE_DIR / "model" / "tiny_base"  # its tokenizer
PAIRS_PER_STEP = 4
CHECK_LAYERS = 4
WORDS = "a clip that drifts over a plain background while the camera slowly turns to the left and back again "


@dataclass(frozen=True)
class Sizes:
    """Sizes of the sequences. `side`: of a frame, in pixels. `frames`, `cot_tokens`: smallest and largest number."""

    prompt_tokens: int
    frames: tuple[int, int]
    side: int
    cot_tokens: tuple[int, int]


SIZES, TINY_SIZES = Sizes(2400, (10, 14), 448, (200, 1000)), Sizes(100, (4, 6), 64, (10, 40))


def make_pairs(builder: SequenceBuilder, count: int, *, sizes: Sizes) -> list[EncodedPair]:
    """Pairs of random frames with CoTs of random tokens; the same for the same sizes."""
    draws = random.Random(0)
    special = {builder.reward_token_id, *builder.tokenizer.all_special_ids, *builder.tokenizer.added_tokens_decoder}
    allowed = sorted(set(range(len(builder.tokenizer))) - special)

    def make_sequence() -> ScoredSequence:
        num_frames = 2 * draws.randint(sizes.frames[0] // 2, sizes.frames[1] // 2)
        generator = torch.Generator().manual_seed(draws.randrange(2**31))
        frames = torch.randint(0, 256, (num_frames, 3, sizes.side, sizes.side), dtype=torch.uint8, generator=generator)
        video = VideoFrames(frames, 24.0, tuple(range(0, 12 * num_frames, 12)), 12 * num_frames)
        bare = builder.encode_prompt(WORDS, video).input_ids.numel()
        repetitions = 1 + round((sizes.prompt_tokens - bare) / len(builder.encode_cot(WORDS)))
        prompt = builder.encode_prompt(WORDS * max(1, repetitions), video)
        return builder.build(prompt, draws.choices(allowed, k=draws.randint(*sizes.cot_tokens)))

    return [EncodedPair(make_sequence(), make_sequence(), (Judgement("AB"[n % 2]),)) for n in range(count)]


def build_model(
    options: argparse.Namespace, *, layers: int, dtype: torch.dtype
) -> tuple[RewardModel, SequenceBuilder]:
    """A reward model with random weights, ready for training; the same for the same shape."""
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    add_reward_token(processor)
    ids = Qwen3VLConfig.from_pretrained(TINY_BASE)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        backbone = Qwen3VLForConditionalGeneration(build_config(ids, layers=layers, is_tiny=options.tiny))
        torch.set_default_dtype(torch.float32)
    randomize(backbone.named_parameters())
    use_packed_attention(backbone.config)
    row = torch.zeros(backbone.config.text_config.hidden_size)
    model = RewardModel(backbone, reward_embedding=row.normal_(std=0.02))
    autocast_dtype = torch.bfloat16 if dtype == torch.bfloat16 else None
    prepare_for_training(model, ModelArguments(), autocast_dtype=autocast_dtype)
    randomize((name, p) for name, p in model.named_parameters() if ".lora_" in name)
    return model.to(DEVICE).train(), SequenceBuilder(processor)


class Ours:
    """Our step."""

    def __init__(self, options: argparse.Namespace, *, layers: int, pairs_per_step: int = PAIRS_PER_STEP) -> None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        os.environ.setdefault("MASTER_PORT", "29517")
        init_distributed()
        arguments = TrainingArguments(
            learning_rate=0.0,
            max_grad_norm=1e9,
            gradient_accumulation_steps=pairs_per_step,
            deepspeed=str(STAGE_DIR / "ds_config" / "zero0.json"),
        )
        self.model, self.builder = build_model(options, layers=layers, dtype=torch.bfloat16)
        engine = build_engine(self.model, arguments, num_steps=100)
        self.trainer = RewardTrainer(
            engine,
            train_data=None,
            eval_data=None,
            arguments=arguments,
            data_arguments=DataArguments(),
            schedule=None,
            checkpoints=None,
            activations=compile_and_plan_activations(engine, ModelArguments()),
        )

    def collate(self, pairs: list[EncodedPair]) -> list[PairBatch]:
        data = PairDataset([], self.builder, VideoBudget())
        batches = [data.collate([pair]) for pair in pairs]
        return [batch.pin_memory() for batch in batches] if DEVICE == "cuda" else batches  # as DataLoader does

    def run(self, batches: list[PairBatch]) -> float:
        """One step; returns the loss."""
        sums, _ = self.trainer.train_step(batches)
        return compute_means(sums, ["GSB"])["loss"]


class Original:
    """The original's step; `model` in one dtype, gradients accumulated over the pairs."""

    def __init__(self, options: argparse.Namespace, *, layers: int, dtype: torch.dtype) -> None:
        self.model, self.builder = build_model(options, layers=layers, dtype=dtype)
        self.model.generator.config.text_config._attn_implementation = "sdpa"
        del self.model.qwen.language_model._deepstack_process  # transformers' own again
        trained = [parameter for _, parameter in self.model.trainable_parameters()]
        for parameter in trained[:-1] if dtype != torch.float32 else []:
            parameter.data = parameter.data.to(dtype)
        self.model.rm_head.float()
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)

    def run(self, pairs: list[EncodedPair], *, should_step: bool = True) -> float:
        """One step; returns the loss."""
        total = 0.0
        for pair in pairs:
            rewards = [self._score(sequence) for sequence in (pair.sequence_a, pair.sequence_b)]
            labels = PairLabels(
                torch.tensor([[1.0 if pair.judgements[0].label == "A" else -1.0]], device=DEVICE),
                torch.ones(1, 1, dtype=torch.bool, device=DEVICE),
                *(torch.zeros(1, 1, device=DEVICE),) * 2,
            )
            loss = compute_pair_loss(*(reward.view(1, 1) for reward in rewards), labels, loss_type="bt") / len(pairs)
            loss.backward()
            total += loss.item()
        if should_step:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total

    def _score(self, sequence: ScoredSequence) -> torch.Tensor:
        generator, ids = self.model.generator, sequence.input_ids.unsqueeze(0).to(DEVICE)
        embeddings = generator.get_input_embeddings()(ids)
        is_reward = (ids == self.builder.reward_token_id).unsqueeze(-1)
        output = generator(
            inputs_embeds=torch.where(is_reward, self.model.reward_embedding.to(embeddings.dtype), embeddings),
            position_ids=sequence.position_ids.unsqueeze(1).to(DEVICE),
            pixel_values_videos=sequence.pixel_values.to(DEVICE, embeddings.dtype),
            video_grid_thw=torch.tensor([sequence.grid_thw], device=DEVICE),
            output_hidden_states=True,
            use_cache=False,
        )
        state = output.hidden_states[-1][0, sequence.reward_position].float()
        return (state @ self.model.rm_head.weight[0].float()).squeeze()


def time_steps(step, *, warmup: int, repeats: int) -> list[float]:
    """Seconds of each repetition, with the device idle before and after it."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


def run_ours(options: argparse.Namespace) -> dict:
    ours = Ours(options, layers=options.layers)
    pairs = make_pairs(ours.builder, PAIRS_PER_STEP, sizes=options.sizes)
    batches = ours.collate(pairs)
    start = time.perf_counter()
    loss = ours.run(batches)
    first_step = time.perf_counter() - start
    seconds = time_steps(lambda: ours.run(batches), warmup=2, repeats=options.repeats)
    median = statistics.median(seconds)
    config = ours.model.generator.config
    needed = sum(count_pair_flops(pair, config, lora_rank=ModelArguments().lora_r) for pair in pairs)
    plan, head_dim = ours.trainer.activations, config.text_config.head_dim
    attention = choose_kernels(torch.empty(1, head_dim, device=DEVICE)).__name__ if DEVICE == "cuda" else "SDPA"
    return {
        "loss": loss,
        "first_step_seconds": first_step,
        "seconds": median,
        "runs": seconds,
        "tokens": sum(batch.packed.input_ids.numel() for batch in batches),
        "needed_tflops_per_second": needed / TERA / median,
        "kept_layers": plan.num_kept if plan else None,
        "kept_vision_blocks": plan.num_kept_blocks if plan else None,
        "text_attention": attention,
        "peak_memory_gib": _peak_gib(),
        "ceilings": measure_ceilings(),
    }


def run_original(options: argparse.Namespace) -> dict:
    original = Original(options, layers=options.layers, dtype=torch.bfloat16)
    pairs = make_pairs(original.builder, PAIRS_PER_STEP, sizes=options.sizes)
    loss = original.run(pairs)
    seconds = time_steps(lambda: original.run(pairs), warmup=1, repeats=options.repeats)
    return {"loss": loss, "seconds": statistics.median(seconds), "runs": seconds, "peak_memory_gib": _peak_gib()}


def run_check(options: argparse.Namespace) -> dict:
    """Relative distance of the gradients from the original's in fp32, over all trained weights together."""
    torch.backends.cudnn.allow_tf32 = False
    gradients, losses = {}, {}
    for name, dtype in (("fp32", torch.float32), ("original", torch.bfloat16)):
        original = Original(options, layers=CHECK_LAYERS, dtype=dtype)
        pairs = make_pairs(original.builder, 1, sizes=options.sizes)
        losses[name] = original.run(pairs, should_step=False)
        gradients[name] = {n: p.grad.float().cpu() for n, p in original.model.trainable_parameters()}
        del original
    ours = Ours(options, layers=CHECK_LAYERS, pairs_per_step=1)
    found = gradients["ours"] = {}
    for name, parameter in ours.model.trainable_parameters():
        parameter.register_hook(lambda gradient, name=name: found.update({name: gradient.float().cpu()}))
    losses["ours"] = ours.run(ours.collate(pairs))
    assert found.keys() == gradients["fp32"].keys()
    truth = gradients["fp32"]

    def distance(name: str) -> float:
        error = sum(float((gradients[name][key] - truth[key]).double().square().sum()) for key in truth)
        return (error / sum(float(value.double().square().sum()) for value in truth.values())) ** 0.5

    return {
        "layers": CHECK_LAYERS,
        "loss": losses,
        "gradient_distance_from_fp32": {name: distance(name) for name in ("original", "ours")},
    }


PARTS = {"check": run_check, "ours": run_ours, "original": run_original}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small model and short sequences, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    options.layers, options.repeats = (2, 1) if options.tiny else (36, 5)
    options.sizes = TINY_SIZES if options.tiny else SIZES
    return options


def run_part(part: str, options: argparse.Namespace, connection: Connection) -> None:
    connection.send(PARTS[part](options))
    os._exit(0)  # worker processes of torch.compile would delay the exit


def main() -> None:
    options = parse_arguments()
    shape = "a tiny Qwen3-VL" if options.tiny else "Qwen3-VL-8B's shape"
    result = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "torch": torch.__version__,
        "model": f"{shape} ({options.layers} text layers), LoRA, tuned vision tower, bf16, random weights",
        "pairs_per_step": PAIRS_PER_STEP,
    }
    context = multiprocessing.get_context("spawn")
    for part in options.parts:
        mine, theirs = context.Pipe()
        context.Process(target=run_part, args=(part, options, theirs)).start()
        theirs.close()
        result[part] = mine.recv()
        if {"ours", "original"} <= result.keys():
            result["speedup"] = result["original"]["seconds"] / result["ours"]["seconds"]
        if options.output:  # after every part, so that an interrupted run leaves a result
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
