"""What is claimed of thinking, then scoring, and whether it holds in our runs; a table in Markdown.

A claim is that one model orders more held-out pairs rightly than another. It holds when the 95% interval of the paired
difference lies above 0, its reverse when it lies below, and it is undecided otherwise.
"""

from dataclasses import dataclass

from evidence.intervals import Interval, judge
from evidence.plan import MASKED, OWN
from evidence.results import SETS, Results

TEXT = "text"
Model = tuple[str, str]
"""An arm and how it is read."""

NAMES = {
    ("discriminative", MASKED): "discriminative, no thought",
    ("coupled", TEXT): "generative, score in the text",
    ("coupled_fast", TEXT): "generative, learning rate x 4",
    ("stage1", OWN): "DeScore, stage 1 only",
    ("descore", OWN): "DeScore, both stages",
    ("stage1_short", OWN): "stage 1, where stage 2 begins",
    ("base", TEXT): "base model, score in the text",
}
"""The four models, which trained for the same time, and where stage 2 and all of them begin."""
SET_NAMES = {
    "in_domain": "in domain",
    "new_combinations": "new combinations",
    "new_rendering": "new rendering",
}


@dataclass(frozen=True)
class Claim:
    """That `better` beats `worse`, in words."""

    text: str
    better: Model
    worse: Model


CLAIMS = (
    Claim("DeScore beats the discriminative model", ("descore", OWN), ("discriminative", MASKED)),
    Claim("DeScore beats the generative model", ("descore", OWN), ("coupled", TEXT)),
    Claim("DeScore beats the generative model, learning rate x 4", ("descore", OWN), ("coupled_fast", TEXT)),
    Claim("stage 1 alone beats the discriminative model", ("stage1", OWN), ("discriminative", MASKED)),
    Claim("stage 1 alone beats the generative model", ("stage1", OWN), ("coupled", TEXT)),
    Claim("both stages beat stage 1 of the same budget", ("descore", OWN), ("stage1", OWN)),
    Claim("stage 2 improves on where it begins", ("descore", OWN), ("stage1_short", OWN)),
    Claim("the head beats the score that the same thoughts state", ("descore", OWN), ("descore", TEXT)),
    Claim("masking half of the thoughts beats masking none", ("stage1_short", OWN), ("mask_0", OWN)),
    Claim("masking half beats masking a quarter", ("stage1_short", OWN), ("mask_25", OWN)),
    Claim("masking half beats masking three quarters", ("stage1_short", OWN), ("mask_75", OWN)),
    Claim("tuning the vision tower beats freezing it", ("stage1_short", OWN), ("frozen_vision", OWN)),
    Claim("Bradley-Terry in stage 2 beats leaving it off", ("descore", OWN), ("bt_off", OWN)),
    Claim("rewards on their own responses beat rewards on others", ("descore", OWN), ("misattached", OWN)),
)


def describe(results: Results) -> str:
    """The four models' accuracies and every claim with its verdict, as Markdown."""
    lines = [
        f"# Evidence, size `{results.content['size']}`",
        "",
        *_accuracy_table(results),
        "",
        *_claim_table(results),
    ]
    commits = sorted({job["commit"] for job in results.content["jobs"]})
    seconds = sum(job["seconds"] for job in results.content["jobs"])
    ran = f"Commit {', '.join(commits)}; {len(results.content['jobs'])} jobs, {seconds / 3600:.1f} hours in all."
    lines += ["", f"{ran} Written by `figure/draw_evidence.py`; do not edit."]
    return "\n".join(lines) + "\n"


def _accuracy_table(results: Results) -> list[str]:
    head = [
        "model",
        *(SET_NAMES[name] for name in SETS),
        "all, with ties",
        "sub-scores right",
        "seeds",
        "minutes of training",
    ]
    rows = [head, ["---"] * len(head)]
    for model, name in NAMES.items():
        if not results.seeds(*model):
            continue
        cells = [show(results.accuracy(*model, sets=[one])) for one in SETS]
        ties = results.mean("with_ties", *model)
        right = results.mean("sub_scores", model[0], OWN if model[1] == TEXT else model[1])
        cells += [f"{ties:.3f}", "-" if right is None else f"{right:.3f}"]
        rows.append([name, *cells, str(len(results.seeds(*model))), _minutes(results, model[0])])
    counts = {name: len(next(s["correct"] for key, s in results.scores.items() if key[2] == name)) for name in SETS} \
        if results.scores else {}  # fmt: skip
    shown = ", ".join(f"{count} {SET_NAMES[name]}" for name, count in counts.items())
    note = (
        f"Accuracy on held-out pairs with a preference ({shown}), 95% intervals over seeds and pairs; chance is 0.5.\n"
        "Sub-scores right: share of what the model's own thoughts say of single dimensions, over all sets."
    )
    return ["## Accuracy", "", *(f"| {' | '.join(row)} |" for row in rows), "", note]


def _minutes(results: Results, arm: str) -> str:
    """Mean minutes of training steps; what stage 2 begins with is the first part of stage 1's run."""
    settings = results.content["settings"]
    share = settings["short_steps"] / settings["long_steps"]
    parts = {"descore": (("stage1", share), ("descore", 1.0)), "stage1_short": (("stage1", share),)}
    minutes = 0.0
    for run, part in parts.get(arm, ((arm, 1.0),)):
        seconds = results.training_seconds(run)
        minutes += part * sum(seconds) / max(len(seconds), 1) / 60
    return f"{minutes:.1f}"


def _claim_table(results: Results) -> list[str]:
    head = ["claim", "difference", *(SET_NAMES[name] for name in SETS), "seeds", "in our runs"]
    rows = [head, ["---"] * len(head)]
    for claim in CLAIMS:
        overall = results.difference(claim.better, claim.worse)
        if overall is None:
            continue
        by_set = [results.difference(claim.better, claim.worse, [name]) for name in SETS]
        cells = [show(overall, "+.3f"), *(f"{one.value:+.3f}" for one in by_set), str(overall.num_seeds)]
        rows.append([claim.text, *cells, judge(overall)])
    note = (
        "Paired difference in accuracy over all three sets, then by set. With one seed, intervals are over pairs only."
    )
    return ["## Claims", "", *(f"| {' | '.join(row)} |" for row in rows), "", note]


def show(interval: Interval, form: str = ".3f") -> str:
    """ "0.750 [0.700, 0.800]"."""
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
