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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

from baselines.text_score import compute_text_margin
from descore.answers import JUDGEMENT_KEY, NOT_ASKED, extract_judgement, parse_annotation, parse_score
from evidence.plan import MASKED, OWN, Plan, Scoring
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


@dataclass
class _Set:
    """The pairs of one held-out set of one scored file, in the order of the file."""

    pairs: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    margins: dict[str, list[float | None]] = field(default_factory=lambda: defaultdict(list))
    rewards: list[float] = field(default_factory=list)
    matches: list[bool] = field(default_factory=list)


def collect(plan: Plan, work: Path, *, name: str) -> dict[str, object]:
    """The results of all jobs that are done."""
    marks = [json.loads(path.read_text()) for path in sorted((work / "done").glob("*.json"))]
    order = {job: place for place, job in enumerate(plan.jobs)}
    marks = sorted((mark for mark in marks if mark["name"] in order), key=lambda mark: order[mark["name"]])
    done = [mark["name"] for mark in marks]
    scores = [
        record
        for job in done
        if job in plan.scorings
        for record in summarise_scored(REPOSITORY / plan.jobs[job].environment["OUTPUT"], plan.scorings[job])
    ]
    logs = {job: work / job / "train_log.jsonl" for job in done if "train.sh" in plan.jobs[job].text}
    curves = [curve for job, path in logs.items() if path.is_file() for curve in read_curves(path, job)]
    settings, device = asdict(plan.size), asdict(plan.device)
    return {"size": name, "settings": settings, "device": device, "jobs": marks, "scores": scores, "curves": curves}


def summarise_scored(path: Path, scoring: Scoring) -> list[dict[str, object]]:
    """Records of a CSV that inference.py wrote: for each set one by the head and, with thoughts, one by the text."""
    sets: dict[str, _Set] = defaultdict(_Set)
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            _add_row(sets[cells["set"]], cells, has_thoughts=scoring.read == OWN)
    records = []
    for name, group in sets.items():
        decided = [pair for pair, label in zip(group.pairs, group.labels, strict=True) if label]
        common = {"arm": scoring.arm, "seed": scoring.seed, "set": name}
        extra = {
            "pairs": blake2b("\n".join(decided).encode(), digest_size=6).hexdigest(),
            "num_ties": group.labels.count(0),
            "mean_reward": _rounded(group.rewards),
            "sub_scores": _rounded(group.matches) if scoring.read == OWN else None,
        }
        for read, margins in group.margins.items():
            records.append({**common, "read": read, **extra, **_summarise_margins(margins, group.labels)})
    return records


def _add_row(group: _Set, cells: dict[str, str], *, has_thoughts: bool) -> None:
    annotation = parse_annotation(cells["answer"])
    if annotation.preference is None:
        return
    group.pairs.append(f"{cells['video_A']} {cells['video_B']} {annotation.preference}")
    group.labels.append(annotation.preference)
    rewards = [float(cells[f"Reward_{side}"]) for side in "AB" if cells[f"Reward_{side}"]]
    is_scored = len(rewards) == 2
    group.rewards += rewards
    group.margins[OWN if has_thoughts else MASKED].append(rewards[0] - rewards[1] if is_scored else None)
    if has_thoughts:
        group.margins[TEXT].append(compute_text_margin(cells["CoT_A"], cells["CoT_B"]) if is_scored else None)
        for side in "AB":
            group.matches += match_sub_scores(cells[f"CoT_{side}"], annotation.scores[side])


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


def _rounded(values: Iterable[float]) -> float | None:
    values = list(values)
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
