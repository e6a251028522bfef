"""Measure what a base model can do in the toy world, with the code that users run.

    cd cold_start; export PYTHONPATH=.:datasets
    python model/evaluate_base.py --checkpoint model/tiny_base --log model/tiny_base_train.json

`RewardScorer` judges H.264 clips greedily and once more at temperature 1, for held-out and for training requests.
Results go under "evaluation" into the log: shares of valid answers, of attributes that the reasoning names correctly,
of correct sub-scores, and of pairs whose better clip the model's own sub-scores find (ties count one half).
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

NUM_PAIRS, SEED = 200, 1
MAX_COT_TOKENS, BATCH_SIZE = 320, 50


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
        pairs = [(said[name], getattr(case.scene, name)) for said, case in zip(named, cases, strict=True)]
        perception[name] = _share_right(pairs)
    for name in DIMENSIONS:
        pairs = [((said or {}).get(name), true[name]) for said, true in zip(given, truth, strict=True)]
        sub_scores[name] = _share_right([pair for pair in pairs if pair[1] != NOT_ASKED])
    sub_scores["mean"] = {key: _mean([shares[key] for shares in sub_scores.values()]) for key in ("right", "prior")}
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


def _share_right(pairs: Sequence[tuple[object, object]]) -> dict[str, float]:
    """Of pairs (said, true): the share that agrees, and the accuracy of always saying the most frequent truth."""
    most_frequent = max(Counter(true for _, true in pairs).values())
    return {"right": _mean([said == true for said, true in pairs]), "prior": round(most_frequent / len(pairs), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="JSON file that gets the result under the key 'evaluation'")
    args = parser.parse_args()
    quiet_libraries()
    scorer = RewardScorer.from_base(args.checkpoint)
    evaluation = {"device": "cpu", "seed": SEED}
    for name, held_out in (("held_out", True), ("training", False)):
        cases = make_cases(scorer, num_pairs=NUM_PAIRS, seed=SEED, held_out=held_out)
        evaluation[name] = judge_cases(scorer, cases)
        torch.manual_seed(SEED)
        evaluation[f"{name}_sampled"] = judge_cases(scorer, cases, temperature=1.0)
    if args.log:
        log = json.loads(args.log.read_text()) if args.log.exists() else {}
        args.log.write_text(json.dumps({**log, "evaluation": evaluation}, indent=1) + "\n")
    sys.stdout.write(json.dumps(evaluation, indent=1) + "\n")


if __name__ == "__main__":
    main()
