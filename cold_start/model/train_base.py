"""Train the tiny base from random weights to look at a clip of the toy world and judge it in the judge's format.

    cd cold_start; export PYTHONPATH=.:datasets
    python model/train_base.py --device cuda --save model/tiny_base
    python model/train_base.py --device cpu --minutes 60 --workers 1 --batch-size 16 --save model/tiny_base

Supervised training on chains of thought that describe what the clip shows. Tokens that carry information (what is
seen, verdicts, scores) have larger weights in the loss. Tokenizer, processor and architecture are those of
`tiny_base/`; the weights begin at random. Training ends after `--steps` or at the time limit, with a learning rate of
zero. The log, FOLDER_train.json beside the checkpoint, ends with an evaluation of what is saved.

The default number of steps is small on purpose: later stages should have something to improve, and from about 1,000
steps on the model learns which (color, shape, motion) triples never occur, and mistakes held-out clips for others.
"""

import argparse
import copy
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from checkpoint import CONFIG_FILE
from infer_utils import RewardScorer
from scored_sequence import judge_problem
from toy_data import SEEN, TINY_BASE, TextBatch, ToyClip, ToyClips, make_texts
from toy_world import scene as rules
from toy_world.render import encode_clip, sample_nuisance
from toy_world.texts import parse_scores, write_prompt

logger = logging.getLogger(__name__)

LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 2e-3, 200, 0.05, (0.9, 0.98), 1.0
NUM_HELD_OUT = 384
"""Clips that perception is measured on."""
STEPS_PER_MEASUREMENT = 50
NUM_EVALUATED_PAIRS, MAX_COT_TOKENS = 200, 320


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit of the training loop")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps, if the time allows")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=14, help="processes that render clips")
    parser.add_argument("--pool-size", type=int, default=12_000, help="training clips, rendered before training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, required=True, help="where to write the checkpoint")
    return parser.parse_args(argv)


def scale_learning_rate(step: int, progress: float) -> float:
    """Factor on the learning rate: linear warm-up by steps, then a cosine in `progress`, which is in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def render_clips(processor, *, num_clips: int, args: argparse.Namespace, held_out: bool) -> list[ToyClip]:
    """The clips, made in worker processes."""
    clips = ToyClips(processor, size=num_clips, seed=args.seed, held_out=held_out)
    loader = DataLoader(clips, batch_size=None, num_workers=args.workers, prefetch_factor=16)
    return list(tqdm(loader, desc="held-out clips" if held_out else "clips", disable=None))


def forward(
    model: Qwen3VLForConditionalGeneration, clips: Sequence[ToyClip], texts: TextBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits float32 [N, vocab_size], targets [N] and weights [N] of all tokens that have a weight."""
    chosen = [clips[index] for index in texts.clip_indices]
    patches = torch.cat([torch.from_numpy(clip.patches) for clip in chosen]).to(model.device)
    input_ids, weights = texts.input_ids.to(model.device), texts.weights.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(
            input_ids=input_ids,
            pixel_values_videos=patches.float() / 127.5 - 1,
            video_grid_thw=torch.tensor([clip.grid_thw for clip in chosen], device=model.device),
            mm_token_type_ids=2 * (input_ids == model.config.video_token_id).int(),
            use_cache=False,
        ).logits
    is_target = weights[:, 1:] > 0
    return logits[:, :-1][is_target].float(), input_ids[:, 1:][is_target], weights[:, 1:][is_target]


@torch.no_grad()
def measure_perception(
    model: Qwen3VLForConditionalGeneration, clips: Sequence[ToyClip], tokenizer, size: int
) -> float:
    """Share of the words for what a clip shows that the model finds, given the text before them; `size` per batch."""
    model.eval()
    rng, right = np.random.default_rng(0), []
    for start in range(0, len(clips), size):
        texts = make_texts(tokenizer, clips, np.arange(start, min(start + size, len(clips))), rng)
        logits, targets, weights = forward(model, clips, texts)
        right.append((logits.argmax(dim=-1) == targets)[weights == SEEN])
    model.train()
    return torch.cat(right).float().mean().item()


def train(model: Qwen3VLForConditionalGeneration, processor, args: argparse.Namespace) -> dict[str, object]:
    """Train until the steps are done or the time is up. Returns the curve and what it took."""
    tokenizer, rng = processor.tokenizer, np.random.default_rng([args.seed, 0])
    held_out = render_clips(processor, num_clips=min(NUM_HELD_OUT, args.pool_size), args=args, held_out=True)
    clips = render_clips(processor, num_clips=args.pool_size, args=args, held_out=False)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    curve, losses, start = [], [], time.monotonic()
    step, is_done = 0, False
    while not is_done:
        minutes = (time.monotonic() - start) / 60
        for group in optimizer.param_groups:
            progress = max(minutes / args.minutes, step / args.steps)
            group["lr"] = LEARNING_RATE * scale_learning_rate(step, progress)
        texts = make_texts(tokenizer, clips, rng.integers(len(clips), size=args.batch_size), rng)
        logits, targets, weights = forward(model, clips, texts)
        loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        is_done = minutes >= args.minutes or step >= args.steps
        if is_done or step % STEPS_PER_MEASUREMENT == 0:
            perception = measure_perception(model, held_out, tokenizer, args.batch_size)
            point = {"minutes": minutes, "loss": torch.stack(losses).mean().item(), "perception": perception}
            curve.append({"step": step, **{name: round(value, 4) for name, value in point.items()}})
            logger.info("%s", curve[-1])
            losses = []
    return {"num_steps": step, "minutes": round(minutes, 2), "num_clips": len(clips), "curve": curve}


def evaluate(checkpoint: Path, *, num_pairs: int) -> dict[str, float]:
    """What a checkpoint can do with the code that users run: greedy judgements of two clips for each held-out request.

    Shares of valid answers, of right sub-scores where they are asked for, and of pairs without a true tie whose better
    clip the model's own sub-scores find (ties count one half).
    """
    scorer, rng = RewardScorer.from_base(checkpoint), np.random.default_rng(1)
    prompts, truth = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(num_pairs):
            request = rules.sample_request(rng, held_out=True)
            problem = judge_problem(write_prompt(request, rng))
            for _ in range(2):
                generator = rules.choose(rng, tuple(rules.GENERATORS))
                scene = rules.sample_clip_scene(request, rng, held_out=True, generator=generator)
                encode_clip(path, scene, sample_nuisance(rng))
                prompts += scorer.encode([path], problems=[problem])
                truth.append(rules.true_scores(request, scene))
    cots = scorer.write_cots(prompts, max_new_tokens=MAX_COT_TOKENS, repetition_penalty=1.0)
    given = [parse_scores(cot.text) for cot in cots]
    asked = [(said or {}, true, name) for said, true in zip(given, truth, strict=True) for name in true]
    right = [said.get(name) == true[name] for said, true, name in asked if true[name] != rules.NOT_ASKED]
    outcomes = []
    for index in range(0, len(truth), 2):
        true, own = (np.sign(_difference(*scores[index : index + 2])) for scores in (truth, given))
        outcomes += [0.5 + true * own / 2] if true else []
    return {
        "json_valid": _mean([scores is not None for scores in given]),
        "sub_scores_right": _mean(right),
        "pair_accuracy": _mean(outcomes),
    }


def _difference(scores_a: dict | None, scores_b: dict | None) -> int:
    return rules.utility(scores_a) - rules.utility(scores_b) if scores_a and scores_b else 0


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # worker processes are forked
    log = {
        "command": shlex.join(["python", "model/train_base.py", *argv]),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "batch_size": args.batch_size,
        "learning_rate": LEARNING_RATE,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    torch.manual_seed(args.seed)
    model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(TINY_BASE, dtype=torch.float32))
    model.generation_config = GenerationConfig.from_pretrained(TINY_BASE)
    model.to(args.device).train()
    log |= {"num_parameters": model.num_parameters(), **train(model, processor, args)}
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(args.save)
    processor.save_pretrained(args.save)
    if args.save.resolve() != TINY_BASE.resolve():
        shutil.copy(TINY_BASE / CONFIG_FILE, args.save)  # the video budget
    log["evaluation"] = evaluate(args.save, num_pairs=min(NUM_EVALUATED_PAIRS, args.pool_size))
    logger.info("%s", log["evaluation"])
    args.save.with_name(f"{args.save.name}_train.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
