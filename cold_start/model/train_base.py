"""Train the tiny base from random weights: to look at a clip of the toy world and to judge it in the judge's format.

    cd cold_start; export PYTHONPATH=.:datasets
    python model/train_base.py --device cuda --save model/tiny_base
    python model/train_base.py --device cpu --minutes 60 --workers 1 --batch-size 16 --save model/tiny_base

Plain supervised training on chains of thought that describe what the clip shows. The tokens that carry information
(what is seen, verdicts, scores) weigh more than the boilerplate around them. Training ends after `--steps` or at the
time limit, by which the learning rate has fallen to zero; `--base` continues from a checkpoint.

The default number of steps stops training early on purpose: later stages shall have something to improve, and from
about 1,000 steps on the model learns which (color, shape, motion) triples never occur, and takes held-out clips for
others.

The working folder always holds the latest weights (fp32) and the log.
"""

import argparse
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from batch_source import BatchSource
from build_tiny import build_model, build_processor, build_tokenizer, save_checkpoint
from fast_forward import compute_label_logits, use_equal_segments
from toy_batches import ATTRIBUTE_KINDS, DECISION, PLAIN, Batch

logger = logging.getLogger(__name__)

KIND_WEIGHTS = {PLAIN: 0.2, DECISION: 2.0, **dict.fromkeys(ATTRIBUTE_KINDS.values(), 4.0)}
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
MAX_GRAD_NORM = 1.0


@dataclass
class TrainLog:
    """One training run as it is written to the log: how it was started, and its curve."""

    command: str
    seed: int
    device: str
    batch_size: int
    learning_rate: float
    num_parameters: int
    base: str | None
    started: str = ""
    num_steps: int = 0
    minutes: float = 0.0
    num_clips: int = 0
    curve: list[dict] = field(default_factory=list)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit of the training loop")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps, if the time allows")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that make clips and texts")
    parser.add_argument("--pool-size", type=int, default=12_000, help="training clips rendered at most")
    parser.add_argument("--held-out", type=int, default=384, help="held-out clips for the perception metrics")
    parser.add_argument("--eval-seconds", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="checkpoint to continue from; without it all is built from the seed")
    parser.add_argument("--work", type=Path, default=Path("tiny_base_work"), help="latest weights, milestones and log")
    parser.add_argument("--save", type=Path, help="where to write the complete checkpoint at the end")
    return parser.parse_args(argv)


def scheduled_rate(progress: float, step: int) -> float:
    """Factor on the learning rate: linear warm-up by steps, then a cosine in `progress`, which is in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def compute_loss(model: Qwen3VLForConditionalGeneration, batch: Batch, kind_weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy over the labelled tokens."""
    logits = compute_label_logits(model, batch).float()
    targets = batch.text.input_ids[batch.text.rows, batch.text.columns]
    weights = kind_weights[batch.text.kinds]
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


@torch.no_grad()
def measure_perception(model: Qwen3VLForConditionalGeneration, batches: Iterator[Batch]) -> dict[str, float]:
    """Share of held-out clips whose attribute is named rightly, given the text before it (teacher forcing)."""
    right, total = dict.fromkeys(ATTRIBUTE_KINDS, 0), 0
    model.eval()
    for batch in batches:
        text = batch.text
        predictions = compute_label_logits(model, batch).argmax(dim=-1)
        is_wrong = predictions != text.input_ids[text.rows, text.columns]
        total += len(text.input_ids)
        for name, kind in ATTRIBUTE_KINDS.items():
            wrong_rows = text.rows[is_wrong & (text.kinds == kind)].unique()
            right[name] += len(text.input_ids) - len(wrong_rows)
    model.train()
    perception = {name: round(count / total, 4) for name, count in right.items()}
    return {**perception, "mean": round(sum(perception.values()) / len(perception), 4)}


@contextmanager
def fast_arithmetic(device: torch.device) -> Iterator[None]:
    """bf16 autocast on a GPU, plain fp32 on a CPU."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        yield


def save_weights(model: Qwen3VLForConditionalGeneration, path: Path) -> None:
    """The weights in fp32; an unfinished file never has the final name."""
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def load_base(args: argparse.Namespace) -> tuple[Qwen3VLForConditionalGeneration, object]:
    """Model in fp32 and processor: from `--base`, or new ones."""
    if args.base is not None:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.base, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(args.base)
    tokenizer = build_tokenizer()
    return build_model(tokenizer, seed=args.seed), build_processor(tokenizer)


class Trainer:
    """The training loop with its log, its metrics and its files."""

    def __init__(self, args: argparse.Namespace, model, source: BatchSource, log: TrainLog) -> None:
        self.args, self.model, self.source, self.log = args, model, source, log
        self.device = torch.device(args.device)
        self.optimizer = build_optimizer(model, args.learning_rate)
        kinds = range(max(KIND_WEIGHTS) + 1)
        self.kind_weights = torch.tensor([KIND_WEIGHTS.get(kind, 0.0) for kind in kinds], device=self.device)

    def train(self) -> None:
        """Train until the steps are done or the time is up."""
        start = last_evaluation = time.monotonic()
        limit = self.args.minutes * 60
        losses: list[torch.Tensor] = []
        for step, batch in enumerate(self.source.batches(self.args.batch_size)):
            progress = max((time.monotonic() - start) / limit, step / self.args.steps)
            losses.append(self._step(batch, self.args.learning_rate * scheduled_rate(progress, step)))
            now = time.monotonic()
            is_done = now - start >= limit or step + 1 >= self.args.steps
            if is_done or now - last_evaluation >= self.args.eval_seconds:
                self.log.num_steps, self.log.minutes = step + 1, round((now - start) / 60, 2)
                self._record(torch.stack(losses).mean().item())
                losses, last_evaluation = [], time.monotonic()
            if is_done:
                return

    def _step(self, batch: Batch, learning_rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with fast_arithmetic(self.device):
            loss = compute_loss(self.model, batch, self.kind_weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _record(self, loss: float) -> None:
        """Measure held-out perception, extend the log and write weights."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.log.num_steps}")
        with fast_arithmetic(self.device):
            perception = measure_perception(self.model, self.source.held_out_batches(self.args.batch_size))
        self.log.num_clips = len(self.source.pool)
        self.log.curve.append(
            {"step": self.log.num_steps, "minutes": self.log.minutes, "loss": round(loss, 4), "perception": perception}
        )
        logger.info(
            "step %d, %.1f min (%.0f s waiting for texts), %d clips, loss %.4f, held-out perception %s",
            self.log.num_steps,
            self.log.minutes,
            self.source.wait_seconds,
            self.log.num_clips,
            loss,
            perception,
        )
        save_weights(self.model, self.args.work / "model.safetensors")
        (self.args.work / "train_log.json").write_text(json.dumps(asdict(self.log), indent=1) + "\n")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("qwen_vl_utils").setLevel(logging.WARNING)  # a line for every clip otherwise
    transformers_logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    args.work.mkdir(parents=True, exist_ok=True)
    model, processor = load_base(args)
    source = BatchSource(
        processor,
        num_workers=args.workers,
        pool_size=args.pool_size,
        num_held_out=args.held_out,
        seed=args.seed,
    )
    try:
        model.to(args.device).train()
        use_equal_segments(model)
        source.start(torch.device(args.device))
        log = TrainLog(
            command=shlex.join(["python", "model/train_base.py", *argv]),
            seed=args.seed,
            device=torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            base=str(args.base) if args.base else None,
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        Trainer(args, model, source, log).train()
    finally:
        source.close()
    if args.save:
        save_checkpoint(model, processor, args.save)


if __name__ == "__main__":
    main(sys.argv[1:])
