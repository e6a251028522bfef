"""Measure what a base model can do in the toy world, with the code that users run.

    cd cold_start; export PYTHONPATH=.:datasets
    python model/evaluate_base.py --checkpoint model/tiny_base --log model/tiny_base_train.json

Clips are H.264 files. `RewardScorer` judges them greedily and once more at temperature 1, for held-out and for
training requests. Results go under "evaluation" into the log: shares of valid answers, of attributes that the
reasoning names correctly, of correct sub-scores, and of pairs whose better clip the model's own sub-scores find (ties
count one half). A prior is the share of the most frequent value, the accuracy of always answering that value.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from infer_utils import RewardScorer
from model_qwen3 import quiet_libraries
from scored_sequence import EncodedPrompt, judge_problem
from toy_world import scene as rules
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import ATTRIBUTES, DIMENSIONS, GENERATORS, NOT_ASKED, Request, Scene
from toy_world.texts import parse_scores, phrase, write_prompt

MAX_COT_TOKENS = 320
BATCH_SIZE = 50


class Case(NamedTuple):
    """A clip that shows `scene`, made for `request`, ready for the model."""

    request: Request
    scene: Scene
    prompt: EncodedPrompt


def make_cases(scorer: RewardScorer, *, num_pairs: int, seed: int, held_out: bool) -> list[Case]:
    """Draw requests and make two clips for each; the two of a pair follow each other."""
    rng, cases = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(num_pairs):
            request = rules.sample_request(rng, held_out=held_out)
            problem = judge_problem(write_prompt(request, rng))
            for _ in range(2):
                generator = rules.choose(rng, tuple(GENERATORS))
                scene = rules.sample_clip_scene(request, rng, held_out, generator=generator)
                encode_clip(path, scene, sample_nuisance(rng))
                cases.append(Case(request, scene, *scorer.encode([path], problems=[problem])))
    return cases


def judge_cases(scorer: RewardScorer, cases: Sequence[Case], *, temperature: float = 0.0) -> dict[str, object]:
    """Let the model judge the clips of pairs; all metrics."""
    cots = scorer.write_cots(
        [case.prompt for case in cases],
        batch_size=BATCH_SIZE,
        max_new_tokens=MAX_COT_TOKENS,
        repetition_penalty=1.0,
        temperature=temperature,
    )
    named = [read_attributes(cot.text) for cot in cots]
    given = [parse_scores(cot.text) for cot in cots]
    truth = [rules.true_scores(case.request, case.scene) for case in cases]
    perception, sub_scores = {}, {}
    for name in ATTRIBUTES:
        shown = [getattr(case.scene, name) for case in cases]
        right = [said[name] == value for said, value in zip(named, shown, strict=True)]
        perception[name] = {"right": _mean(right), "prior": _share_of_most_frequent(shown)}
    for name in DIMENSIONS:
        asked = [(said, true[name]) for said, true in zip(given, truth, strict=True) if true[name] != NOT_ASKED]
        right = [said is not None and said[name] == true for said, true in asked]
        prior = _share_of_most_frequent([true for _, true in asked])
        sub_scores[name] = {"right_if_asked": _mean(right), "prior_if_asked": prior}
    keys = ("right_if_asked", "prior_if_asked")
    sub_scores["mean"] = {key: _mean([sub_scores[name][key] for name in DIMENSIONS]) for key in keys}
    return {
        "num_clips": len(cases),
        "json_valid": _mean([scores is not None for scores in given]),
        "characters_per_cot": _mean([len(cot.text) for cot in cots]),
        "tokens_per_cot": _mean([len(cot.ids) for cot in cots]),
        "perception": perception,
        "sub_scores": sub_scores,
        "pairs": measure_pairs(given, truth),
    }


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


def measure_pairs(given: Sequence[dict | None], truth: Sequence[dict]) -> dict[str, float]:
    """Preference from the model's own sub-scores against the true one, over pairs that are no true ties."""
    outcomes = []
    for index in range(0, len(truth), 2):
        true_a, true_b = map(rules.utility, truth[index : index + 2])
        own = given[index : index + 2]
        own_a, own_b = (0, 0) if None in own else map(rules.utility, own)
        if true_a != true_b:
            outcomes.append(np.sign(true_a - true_b) * np.sign(own_a - own_b))
    own_ties = _mean([outcome == 0 for outcome in outcomes])
    return {"num_pairs": len(outcomes), "accuracy": 0.5 + _mean(outcomes) / 2, "own_ties": own_ties}


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _share_of_most_frequent(values: Sequence[object]) -> float:
    return round(max(Counter(values).values()) / len(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="JSON file that gets the result under the key 'evaluation'")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of clips per set of requests")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    quiet_libraries()
    scorer = RewardScorer.from_base(args.checkpoint, seed=args.seed)
    evaluation = {"device": "cpu", "seed": args.seed}
    for name, held_out in (("held_out", True), ("training", False)):
        cases = make_cases(scorer, num_pairs=args.pairs, seed=args.seed, held_out=held_out)
        evaluation[name] = judge_cases(scorer, cases)
        torch.manual_seed(args.seed)
        evaluation[f"{name}_sampled"] = judge_cases(scorer, cases, temperature=1.0)
    if args.log:
        log = json.loads(args.log.read_text()) if args.log.exists() else {}
        args.log.write_text(json.dumps({**log, "evaluation": evaluation}, indent=1) + "\n")
    sys.stdout.write(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    main()
