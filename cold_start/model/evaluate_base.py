"""Measure what a base model can do in the toy world, through the path every user takes.

    cd cold_start; export PYTHONPATH=.:datasets
    python model/evaluate_base.py --checkpoint model/tiny_base --log model/tiny_base_train.json

Clips are real H.264 files, read by `vision_process.load_video`; prompts are built by `SequenceBuilder`; the chain of
thought is decoded by `generate`, greedily and once more sampled at temperature 1, for held-out and for training
requests. Written under "evaluation" in the log:

- how many answers are valid JSON, and their length in characters and tokens;
- how many attributes of the clip the reasoning names rightly;
- how many sub-scores are right, per dimension;
- how often the clip preferred by the model's own sub-scores is the truly better one (ties count one half).
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from checkpoint import stored_video_budget
from infer_utils.scorer import left_padded_inputs
from judgement_metrics import Judgement, summarise
from model_qwen3 import add_reward_token
from scored_sequence import EncodedPrompt, SequenceBuilder, judge_problem
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import (
    GENERATORS,
    Request,
    Scene,
    choose,
    sample_clip_scene,
    sample_request,
    write_prompt,
)
from vision_process import VideoBudget, load_video

logger = logging.getLogger(__name__)


def load_checkpoint(folder: Path, device: str) -> tuple[Qwen3VLForConditionalGeneration, SequenceBuilder, VideoBudget]:
    """Model in fp32, sequence builder (with `<Reward>` added to its tokenizer) and video budget of a checkpoint."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    add_reward_token(processor)
    return model, SequenceBuilder(processor), stored_video_budget(str(folder))


@torch.no_grad()
def generate_cots(
    model: Qwen3VLForConditionalGeneration,
    builder: SequenceBuilder,
    prompts: Sequence[EncodedPrompt],
    *,
    is_sampled: bool,
) -> list[tuple[str, int]]:
    """Chains of thought, greedy or sampled at temperature 1, each with its number of tokens (EOS not counted)."""
    tokenizer = builder.tokenizer
    inputs = left_padded_inputs(prompts, builder, device=model.device)
    sampling = {"do_sample": True, "top_k": 0} if is_sampled else {"do_sample": False}
    output = model.generate(**inputs, **sampling)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    answers = [ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))] for ids in rows]
    return [(tokenizer.decode(ids), len(ids)) for ids in answers]


@dataclass(frozen=True)
class Case:
    """A clip that shows `scene`, made for `request`, ready for the model."""

    request: Request
    scene: Scene
    prompt: EncodedPrompt


def make_cases(
    builder: SequenceBuilder, budget: VideoBudget, *, num_pairs: int, seed: int, held_out: bool
) -> list[Case]:
    """Draw requests and make two clips for each; the two of a pair follow each other."""
    rng = np.random.default_rng(seed)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(num_pairs):
            request = sample_request(rng, held_out=held_out)
            problem = judge_problem(write_prompt(request, rng))
            for _ in range(2):
                scene = sample_clip_scene(request, rng, held_out, generator=choose(rng, tuple(GENERATORS)))
                encode_clip(path, scene, sample_nuisance(rng))
                video = load_video(path, budget, size_factor=builder.size_factor)
                cases.append(Case(request, scene, builder.encode_prompt(problem, video)))
    return cases


def judge_cases(
    model, builder: SequenceBuilder, cases: Sequence[Case], *, batch_size: int, is_sampled: bool = False
) -> list[Judgement]:
    """Let the model judge the cases, in their order."""
    judgements = []
    for start in range(0, len(cases), batch_size):
        chunk = cases[start : start + batch_size]
        answers = generate_cots(model, builder, [case.prompt for case in chunk], is_sampled=is_sampled)
        for case, (cot, num_tokens) in zip(chunk, answers, strict=True):
            judgements.append(Judgement(case.request, case.scene, cot, num_tokens))
        logger.info("%d of %d clips judged", len(judgements), len(cases))
    return judgements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="JSON file that gets the result under the key 'evaluation'")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of clips per set of requests")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, help="write this many chains of thought to the output")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("qwen_vl_utils").setLevel(logging.WARNING)  # a line for every clip otherwise
    transformers_logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    model, builder, budget = load_checkpoint(args.checkpoint, args.device)
    evaluation = {"device": args.device, "seed": args.seed}
    for held_out in (True, False):
        name = "held_out" if held_out else "training"
        cases = make_cases(builder, budget, num_pairs=args.pairs, seed=args.seed, held_out=held_out)
        greedy = judge_cases(model, builder, cases, batch_size=args.batch_size)
        sampled = judge_cases(model, builder, cases, batch_size=args.batch_size, is_sampled=True)
        evaluation |= {name: summarise(greedy), f"{name}_sampled": summarise(sampled)}
        for judgement in greedy[: args.show]:
            sys.stdout.write(f"{judgement.request}\n{judgement.scene}\n{judgement.cot}\n\n")
    if args.log:
        log = json.loads(args.log.read_text()) if args.log.exists() else {}
        args.log.write_text(json.dumps({**log, "evaluation": evaluation}, indent=1) + "\n")
    sys.stdout.write(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    main()
