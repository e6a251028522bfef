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

A prior is the share of the most frequent value: what always answering that value would give.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from checkpoint import stored_video_budget
from infer_utils.scorer import left_padded_inputs
from model_qwen3 import add_reward_token
from scored_sequence import EncodedPrompt, SequenceBuilder, judge_problem
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import (
    ATTRIBUTES,
    DIMENSIONS,
    GENERATORS,
    Request,
    Scene,
    choose,
    sample_clip_scene,
    sample_request,
    true_scores,
    utility,
)
from toy_world.texts import parse_scores, phrase, write_prompt
from vision_process import VideoBudget, load_video

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A clip that shows `scene`, made for `request`, ready for the model."""

    request: Request
    scene: Scene
    prompt: EncodedPrompt


@dataclass(frozen=True)
class Judgement:
    """What the model wrote about a case, in `num_tokens` tokens (EOS not counted)."""

    case: Case
    cot: str
    num_tokens: int


def load_checkpoint(folder: Path, device: str) -> tuple[Qwen3VLForConditionalGeneration, SequenceBuilder, VideoBudget]:
    """Model in fp32, sequence builder (with `<Reward>` added to its tokenizer) and video budget of a checkpoint."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    add_reward_token(processor)
    return model, SequenceBuilder(processor), stored_video_budget(str(folder))


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


@torch.no_grad()
def judge_cases(
    model, builder: SequenceBuilder, cases: Sequence[Case], *, batch_size: int, is_sampled: bool = False
) -> list[Judgement]:
    """Let the model judge the cases in their order, greedily or sampled at temperature 1."""
    tokenizer, judgements = builder.tokenizer, []
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    sampling = {"do_sample": True, "top_k": 0} if is_sampled else {"do_sample": False}
    for start in range(0, len(cases), batch_size):
        chunk = cases[start : start + batch_size]
        inputs = left_padded_inputs([case.prompt for case in chunk], builder, device=model.device)
        output = model.generate(**inputs, **sampling)[:, inputs["input_ids"].shape[1] :].tolist()
        for case, ids in zip(chunk, output, strict=True):
            answer = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
            judgements.append(Judgement(case, tokenizer.decode(answer), len(answer)))
        logger.info("%d of %d clips judged", len(judgements), len(cases))
    return judgements


def read_attributes(cot: str) -> dict[str, str | None]:
    """What the reasoning says the clip shows: for each attribute the first of its values named in its line."""
    lines = {line.split(":", 1)[0].lower(): line.split("prompt", 1)[0] for line in cot.splitlines() if ":" in line}
    named = {}
    for dimension, names in DIMENSIONS.items():
        line = lines.get(dimension, "")
        for name in names:
            starts = {value: line.find(f" {phrase(name, value)}") for value in ATTRIBUTES[name]}
            named[name] = min((start, value) for value, start in [*starts.items(), (None, len(line))] if start >= 0)[1]
    return named


def _share(outcomes: Sequence[float]) -> float:
    return round(float(np.mean(outcomes)), 4)


def _prior(values: Sequence[object]) -> float:
    return round(max(Counter(values).values()) / len(values), 4)


def measure_pairs(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Preference from the model's own sub-scores against the true one, over pairs that are no true ties."""
    outcomes = []
    for pair in zip(judgements[::2], judgements[1::2], strict=True):
        true = [utility(true_scores(judgement.case.request, judgement.case.scene)) for judgement in pair]
        scores = [parse_scores(judgement.cot) for judgement in pair]
        own = [0, 0] if None in scores else [utility(of_clip) for of_clip in scores]
        if true[0] != true[1]:
            outcomes.append(np.sign(true[0] - true[1]) * np.sign(own[0] - own[1]))
    own_ties = _share([outcome == 0 for outcome in outcomes])
    return {"num_pairs": len(outcomes), "accuracy": 0.5 + _share(outcomes) / 2, "own_ties": own_ties}


def summarise(judgements: Sequence[Judgement]) -> dict[str, object]:
    """All metrics of a list of judged pairs."""
    named = [read_attributes(judgement.cot) for judgement in judgements]
    given = [parse_scores(judgement.cot) for judgement in judgements]
    perception, sub_scores = {}, {}
    for name in ATTRIBUTES:
        truth = [getattr(judgement.case.scene, name) for judgement in judgements]
        right = [said[name] == value for said, value in zip(named, truth, strict=True)]
        perception[name] = {"right": _share(right), "prior": _prior(truth)}
    for name in DIMENSIONS:
        truth = [true_scores(judgement.case.request, judgement.case.scene)[name] for judgement in judgements]
        asked = [(said, true) for said, true in zip(given, truth, strict=True) if true != "N/A"]
        right = [said is not None and said[name] == true for said, true in asked]
        sub_scores[name] = {"right_if_asked": _share(right), "prior_if_asked": _prior([true for _, true in asked])}
    keys = ("right_if_asked", "prior_if_asked")
    sub_scores["mean"] = {key: _share([sub_scores[name][key] for name in DIMENSIONS]) for key in keys}
    return {
        "num_clips": len(judgements),
        "json_valid": _share([scores is not None for scores in given]),
        "characters_per_cot": _share([len(judgement.cot) for judgement in judgements]),
        "tokens_per_cot": _share([judgement.num_tokens for judgement in judgements]),
        "perception": perception,
        "sub_scores": sub_scores,
        "pairs": measure_pairs(judgements),
    }


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
    for name, held_out in (("held_out", True), ("training", False)):
        cases = make_cases(builder, budget, num_pairs=args.pairs, seed=args.seed, held_out=held_out)
        greedy = judge_cases(model, builder, cases, batch_size=args.batch_size)
        sampled = judge_cases(model, builder, cases, batch_size=args.batch_size, is_sampled=True)
        evaluation |= {name: summarise(greedy), f"{name}_sampled": summarise(sampled)}
        for judgement in greedy[: args.show]:
            sys.stdout.write(f"{judgement.case.request}\n{judgement.case.scene}\n{judgement.cot}\n\n")
    if args.log:
        log = json.loads(args.log.read_text()) if args.log.exists() else {}
        args.log.write_text(json.dumps({**log, "evaluation": evaluation}, indent=1) + "\n")
    sys.stdout.write(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    main()
