"""What is claimed of thinking, then scoring, and whether it holds in our runs; a table in Markdown.

A claim is that one model orders more held-out pairs rightly than another. It holds when the 95% interval of the paired
difference lies above 0, its reverse when it lies below, and it is undecided otherwise.
"""

from collections.abc import Sequence

from evidence.intervals import Interval, judge
from evidence.plan import MASKED, OWN
from evidence.results import SETS, Results

TEXT = "text"
NAMES = {  # an arm and how it is read
    ("discriminative", MASKED): "discriminative, no thought",
    ("coupled", TEXT): "generative, score in the text",
    ("coupled_fast", TEXT): "generative, learning rate x 4",
    ("stage1", OWN): "DeScore, stage 1 only",
    ("descore", OWN): "DeScore, both stages",
    ("stage1_short", OWN): "stage 1, where stage 2 begins",
    ("base", TEXT): "base model, score in the text",
}
"""The four models, which trained for the same time, and where stage 2 and all of them begin."""
SET_NAMES = {name: name.replace("_", " ") for name in SETS}


CLAIMS = {  # what is claimed: the better model, the worse one
    "DeScore beats the discriminative model": (("descore", OWN), ("discriminative", MASKED)),
    "DeScore beats the generative model": (("descore", OWN), ("coupled", TEXT)),
    "DeScore beats the generative model, learning rate x 4": (("descore", OWN), ("coupled_fast", TEXT)),
    "stage 1 alone beats the discriminative model": (("stage1", OWN), ("discriminative", MASKED)),
    "stage 1 alone beats the generative model": (("stage1", OWN), ("coupled", TEXT)),
    "both stages beat stage 1 of the same budget": (("descore", OWN), ("stage1", OWN)),
    "stage 2 improves on where it begins": (("descore", OWN), ("stage1_short", OWN)),
    "the head beats the score that the same thoughts state": (("descore", OWN), ("descore", TEXT)),
    "masking half of the thoughts beats masking none": (("stage1_short", OWN), ("mask_0", OWN)),
    "masking half beats masking a quarter": (("stage1_short", OWN), ("mask_25", OWN)),
    "masking half beats masking three quarters": (("stage1_short", OWN), ("mask_75", OWN)),
    "tuning the vision tower beats freezing it": (("stage1_short", OWN), ("frozen_vision", OWN)),
    "Bradley-Terry in stage 2 beats leaving it off": (("descore", OWN), ("bt_off", OWN)),
    "rewards on their own responses beat rewards on others": (("descore", OWN), ("misattached", OWN)),
}


def describe(results: Results) -> str:
    """The four models' accuracies and every claim with its verdict, as Markdown."""
    jobs = results.content["jobs"]
    commits, hours = sorted({job["commit"] for job in jobs}), sum(job["seconds"] for job in jobs) / 3600
    lines = [
        f"# Evidence, size `{results.content['size']}`",
        *("", "## Accuracy", "", *_accuracy_table(results)),
        *("", "## Claims", "", *_claim_table(results)),
        f"\nCommit {', '.join(commits)}; {len(jobs)} jobs, {hours:.1f} hours in all. "
        "Written by `figure/draw_evidence.py`; do not edit.",
    ]
    return "\n".join(lines) + "\n"


def _format_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _accuracy_table(results: Results) -> list[str]:
    set_names = [SET_NAMES[name] for name in SETS]
    head = ["model", *set_names, "all, with ties", "sub-scores right", "seeds", "minutes of training"]
    rows = []
    for model, name in NAMES.items():
        if not results.seeds(*model):
            continue
        cells = [show(results.accuracy(*model, sets=[one])) for one in SETS]
        ties = results.mean("with_ties", *model)
        right = results.mean("sub_scores", model[0], OWN if model[1] == TEXT else model[1])
        cells += [f"{ties:.3f}", "-" if right is None else f"{right:.3f}"]
        rows.append([name, *cells, str(len(results.seeds(*model))), _minutes(results, model[0])])
    counts = {key[2]: len(score["correct"]) for key, score in results.scores.items()}
    shown = ", ".join(f"{counts[name]} {SET_NAMES[name]}" for name in SETS if name in counts)
    note = (
        f"Accuracy on held-out pairs with a preference ({shown}), 95% intervals over seeds and pairs; chance is 0.5.\n"
        "Sub-scores right: share of what the model's own thoughts say of single dimensions, over all sets."
    )
    return [*_format_rows(head, rows), "", note]


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
    rows = []
    for text, (better, worse) in CLAIMS.items():
        overall = results.difference(better, worse)
        if overall is None:
            continue
        by_set = [results.difference(better, worse, [name]) for name in SETS]
        cells = [show(overall, "+.3f"), *(f"{one.value:+.3f}" for one in by_set), str(overall.num_seeds)]
        rows.append([text, *cells, judge(overall)])
    head = ["claim", "difference", *(SET_NAMES[name] for name in SETS), "seeds", "in our runs"]
    note = (
        "Paired difference in accuracy over all three sets, then by set. With one seed, intervals are over pairs only."
    )
    return [*_format_rows(head, rows), "", note]


def show(interval: Interval, form: str = ".3f") -> str:
    """ "0.750 [0.700, 0.800]"."""
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
