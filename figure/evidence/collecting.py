"""From what the jobs wrote to one small file of results: what every figure and claim is drawn from.

    {"size", "settings", "device",
     "jobs":   [{"name", "command", "commit", "started", "seconds"}],
     "scores": [{"arm", "seed", "set", "read", "pairs", "correct", "num_ties", "with_ties", "threshold", "mean_reward",
                 "sub_scores", "num_unscored"}],
     "curves": [{"run", "seed", "metric", "values"}]}

`read`: how a score is read, `own` (the head, after the model's own chain of thought), `masked` (the head, without one)
or `text` (the overall score that the thought states). `correct`: a string of 0 and 1, one a pair with a preference in
the order of the file; `pairs`: a digest of these pairs. `sub_scores`: share of the true sub-scores that the thoughts
state, null without thoughts. A pair that could not be scored is wrong. `values` of a curve: one a training step.
"""

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from baselines.text_score import compute_text_margin
from descore.answers import JUDGEMENT_KEY, NOT_ASKED, extract_judgement, parse_annotation, parse_score
from evidence.plan import OWN, Plan, Scoring
from evidence.running import REPOSITORY
from scoring.accuracy import compute_pair_accuracy

TEXT = "text"
CURVES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "grad_norm": "grad_norm",
    "seconds_per_step": "seconds",
    "timing/seconds/step": "seconds",
    "actor/grad_norm": "grad_norm",
    "bt/loss": "bt_loss",
    "bt/accuracy": "bt_accuracy",
    "reward/overall/mean": "reward",
    "reward/sub/mean": "sub_scores",
    "reward/agreement/mean": "accuracy",
}
"""Name in the logs of the two stages -> name in the results."""
DIGITS = 4


def collect(plan: Plan, work: Path, *, name: str) -> dict[str, object]:
    """The results of all jobs that are done."""
    paths = [work / "done" / f"{job}.json" for job in plan.jobs]
    marks = [json.loads(path.read_text()) for path in paths if path.is_file()]
    scores, curves = [], []
    for job in (mark["name"] for mark in marks):
        if job in plan.scorings:
            scores += summarise_scored(REPOSITORY / plan.jobs[job].environment["OUTPUT"], plan.scorings[job])
        log = work / job / "train_log.jsonl"
        if "train.sh" in plan.jobs[job].text and log.is_file():
            curves += read_curves(log, job)
    settings, device = asdict(plan.size), asdict(plan.device)
    return {"size": name, "settings": settings, "device": device, "jobs": marks, "scores": scores, "curves": curves}


def summarise_scored(path: Path, scoring: Scoring) -> list[dict[str, object]]:
    """Records of a CSV that inference.py wrote: for each set one by the head and, with thoughts, one by the text."""
    sets: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            if parse_annotation(cells["answer"]).preference is not None:
                sets[cells["set"]].append(cells)
    return [record for name, rows in sets.items() for record in _summarise_set(name, rows, scoring)]


def _summarise_set(name: str, rows: Sequence[dict[str, str]], scoring: Scoring) -> Iterator[dict[str, object]]:
    has_thoughts = scoring.read == OWN
    annotations = [parse_annotation(row["answer"]) for row in rows]
    labels = [annotation.preference for annotation in annotations]
    pairs = zip(rows, labels, strict=True)
    decided = [f"{row['video_A']} {row['video_B']} {label}" for row, label in pairs if label]
    rewards = [[float(row[f"Reward_{side}"]) for side in "AB" if row[f"Reward_{side}"]] for row in rows]
    matches = [
        match
        for row, annotation in zip(rows, annotations, strict=True)
        for side in "AB"
        for match in match_sub_scores(row[f"CoT_{side}"], annotation.scores[side])
    ]
    common = {
        **{"arm": scoring.arm, "seed": scoring.seed, "set": name, "read": scoring.read},
        "pairs": blake2b("\n".join(decided).encode(), digest_size=6).hexdigest(),
        "num_ties": labels.count(0),
        "mean_reward": _rounded([reward for both in rewards for reward in both]),
        "sub_scores": _rounded(matches) if has_thoughts else None,
    }
    margins = [both[0] - both[1] if len(both) == 2 else None for both in rewards]
    yield {**common, **_summarise_margins(margins, labels)}
    if has_thoughts:
        of_texts = [compute_text_margin(row["CoT_A"], row["CoT_B"]) for row in rows]
        margins = [None if margin is None else text for margin, text in zip(margins, of_texts, strict=True)]
        yield {**common, "read": TEXT, **_summarise_margins(margins, labels)}


def match_sub_scores(cot: str, truth: dict[str, object]) -> list[bool]:
    """For each dimension that the prompt asks for, whether the thought states the true sub-score."""
    stated = (extract_judgement(cot) or {}).get(JUDGEMENT_KEY)
    stated = stated if isinstance(stated, dict) else {}
    return [parse_score(stated.get(dimension)) == score for dimension, score in truth.items() if score != NOT_ASKED]


def _summarise_margins(margins: Sequence[float | None], labels: Sequence[int]) -> dict[str, object]:
    """A missing margin is one that is wrong whatever the label: it stands as 0 beside real ones, and as no tie."""
    right = [label * (margin or 0.0) > 0 for margin, label in zip(margins, labels, strict=True) if label]
    scored = [(margin, label) for margin, label in zip(margins, labels, strict=True) if margin is not None]
    accuracy = compute_pair_accuracy(*zip(*scored, strict=True), num_resamples=1) if scored else None
    share = len(scored) / len(margins)
    return {
        "correct": "".join(str(int(value)) for value in right),
        "with_ties": round(accuracy.with_ties.value * share, DIGITS) if accuracy else 0.0,
        "threshold": accuracy.threshold if accuracy else None,
        "num_unscored": len(margins) - len(scored),
    }


def read_curves(path: Path, job: str) -> list[dict[str, object]]:
    """The curves of a training log; a step without a value has null."""
    run, _, seed = job.rpartition("_")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.get("step") and ("seconds_per_step" in line or "bt/loss" in line)]
    curves = []
    for logged, metric in CURVES.items():
        values = [line.get(logged) for line in lines]
        if any(value is not None for value in values):
            shown = [round(v, DIGITS) if v is not None and math.isfinite(v) else None for v in values]
            curves.append({"run": run, "seed": int(seed), "metric": metric, "values": shown})
    return curves


def _rounded(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), DIGITS) if values else None


def write_results(path: Path, results: dict[str, object]) -> None:
    """One record a line, so that changes can be read; complete or absent."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            records = ",\n".join(json.dumps(record) for record in value)
            parts.append(f"{json.dumps(key)}: [\n{records}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(temporary, path)
