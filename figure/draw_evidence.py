"""Draws every figure of the evidence from a file of results.

    python figure/draw_evidence.py figure/results/small.json

Writes small_{accuracy,curves,data,ablations}.png and small.md, the tables of accuracies and claims, beside it and
prints the tables. Markers, lines and hatches differ, not color alone; figures are as wide as a phone. A figure whose
runs are missing is left out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from evidence.claims import NAMES, SET_NAMES, TEXT, describe  # noqa: E402
from evidence.intervals import Interval, smooth  # noqa: E402
from evidence.plan import DATA_PERCENTS, MASKED, OWN  # noqa: E402
from evidence.results import SETS, Results  # noqa: E402

WIDTH, DPI, FONT_SIZE = 5.0, 160, 11
DARK, MIDDLE, LIGHT, PALE, BRIGHT = "#1b2430", "#1d4e89", "#7fa7d0", "#e4e4e4", "#c98a1b"
BARS = {  # color and hatch, in the order of NAMES
    "discriminative": (PALE, ""),
    "coupled": (BRIGHT, "//"),
    "coupled_fast": ("white", "//"),
    "stage1": (LIGHT, ".."),
    "descore": (MIDDLE, ""),
    "stage1_short": ("white", "xx"),
    "base": ("white", ""),
}
LINES = (("o", "-", MIDDLE), ("s", "--", BRIGHT), ("^", ":", DARK))
SHARE_OF_RUN_SMOOTHED = 0.15
ABLATIONS = {  # label, arm, what it is compared with
    "no masking (0)": ("mask_0", "stage1_short"),
    "masking 0.25": ("mask_25", "stage1_short"),
    "masking 0.75": ("mask_75", "stage1_short"),
    "vision tower frozen": ("frozen_vision", "stage1_short"),
    "stage 2 without BT": ("bt_off", "descore"),
    "rewards on wrong rows": ("misattached", "descore"),
}


def new_figure(height: float) -> Figure:
    """As wide as a phone, `height` inches high."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def draw_accuracy(results: Results) -> Figure | None:
    """A panel per held-out set; bars without ties with intervals, diamonds with ties (mean over seeds)."""
    models = {model: name for model, name in NAMES.items() if results.seeds(*model)}
    if not models:
        return None
    figure = new_figure(1.0 + 0.42 * len(models) * len(SETS))
    panels = figure.subplots(len(SETS), 1, sharex=True)
    rows = np.arange(len(models))[::-1]
    for ax, name in zip(panels, SETS, strict=True):
        for row, model in zip(rows, models, strict=True):
            estimate = results.accuracy(*model, sets=[name])
            color, hatch = BARS[model[0]]
            style = {"color": color, "hatch": hatch, "edgecolor": DARK, "capsize": 3}
            ax.barh(row, estimate.value, 0.7, xerr=_errors([estimate]), **style)
            ax.plot(results.mean("with_ties", *model, sets=[name]), row, "D", color="white", markeredgecolor=DARK)
        ax.axvline(0.5, color=DARK, linestyle=":", linewidth=1)
        ax.set_yticks(rows, [text.replace(", ", ",\n") for text in models.values()], fontsize=FONT_SIZE - 3)
        ax.set_title(SET_NAMES[name], loc="left", fontsize=FONT_SIZE)
    panels[-1].set_xlim(0.0, 1.0)
    panels[-1].set_xlabel("share of pairs in the right order\n(bar: without ties, diamond: with ties; dotted: chance)")
    return figure


def _errors(estimates: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the bars below and above, as matplotlib takes them."""
    return [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def draw_curves(results: Results) -> Figure | None:
    """Training of BT and of GRPO over time: pairs in the right order, gradient norms, BT loss in stage 2."""
    shown = {"stage 1 (BT)": "stage1", "discriminative (BT)": "discriminative", "generative (GRPO)": "coupled"}
    stage2 = {"DeScore": "descore", "without BT": "bt_off", "rewards on wrong rows": "misattached"}
    panels = {  # title: metric, and the run of each line
        "training pairs in the right order": ("accuracy", shown),
        "gradient norm / its median": ("grad_norm", shown),
        "stage 2: Bradley-Terry loss of the head": ("bt_loss", stage2),
    }
    if not any(results.runs(run, "accuracy") for run in shown.values()):
        return None
    figure = new_figure(9)
    for ax, (title, (metric, runs)) in zip(figure.subplots(3, 1), panels.items(), strict=True):
        for (label, run), style in zip(runs.items(), LINES, strict=True):
            _draw_runs(ax, results, run, metric, label=label, style=style)
        ax.set_title(title, loc="left", fontsize=FONT_SIZE)
        ax.set_yscale("log" if metric == "grad_norm" else "linear")
        ax.set_xlabel("minutes of training")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=FONT_SIZE - 2)
    return figure


def _draw_runs(ax: Axes, results: Results, run: str, metric: str, *, label: str, style: tuple) -> None:
    """A line per seed, smoothed; only the first is in the legend."""
    marker, line, color = style
    for index, seed in enumerate(results.runs(run, metric)):
        values = results.curve(run, metric, seed)
        minutes = np.cumsum(np.nan_to_num(results.curve(run, "seconds", seed))) / 60
        if metric == "grad_norm":
            values = values / (np.nanmedian(values) or 1.0)
        values = smooth(values, max(1, round(SHARE_OF_RUN_SMOOTHED * len(values))))
        marks = {"marker": marker, "markevery": max(1, len(values) // 6), "markersize": 5}
        drawn = {"linestyle": line, "color": color, "linewidth": 1.4, "alpha": 0.9}
        ax.plot(minutes, values, label=None if index else label, **marks, **drawn)


def draw_data(results: Results) -> Figure | None:
    """Accuracy over the share of the training pairs, at equal steps."""
    shares = (*DATA_PERCENTS, 100)
    arms = {
        "stage 1, own thoughts": ("stage1_data_{}", "stage1_short", OWN),
        "discriminative, no thought": ("discriminative_data_{}", "discriminative_short", MASKED),
    }
    curves = {}
    for label, (part, whole, read) in arms.items():
        points = [(share, results.accuracy(whole if share == 100 else part.format(share), read)) for share in shares]
        curves[label] = [(share, estimate) for share, estimate in points if estimate is not None]
    if not any(curves.values()):
        return None
    figure = new_figure(3.8)
    ax = figure.subplots()
    for (label, points), (marker, line, color) in zip(curves.items(), LINES, strict=False):
        x, estimates = [share for share, _ in points], [estimate for _, estimate in points]
        values = [estimate.value for estimate in estimates]
        style = {"marker": marker, "linestyle": line, "color": color, "capsize": 4}
        ax.errorbar(x, values, _errors(estimates), label=label, **style)
    ax.axhline(0.5, color=DARK, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks(shares, [f"{share}%" for share in shares])
    ax.minorticks_off()
    ax.set_xlabel("share of the training pairs")
    ax.set_ylabel("held-out pairs in the right order")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def draw_ablations(results: Results) -> Figure | None:
    """Paired differences in accuracy to the model without the change, over all held-out pairs."""
    names = {"descore": "DeScore", "stage1_short": "stage 1"}
    rows = {
        f"{label}\n(against {names[reference]})": results.difference((arm, OWN), (reference, OWN))
        for label, (arm, reference) in ABLATIONS.items()
    }
    rows["score in the text\n(against DeScore's head)"] = results.difference(("descore", TEXT), ("descore", OWN))
    rows = {label: difference for label, difference in rows.items() if difference is not None}
    if not rows:
        return None
    figure = new_figure(1.0 + 0.6 * len(rows))
    ax = figure.subplots()
    for row, (label, difference) in enumerate(reversed(rows.items())):
        style = {"marker": "o" if "DeScore" in label else "s", "color": MIDDLE, "capsize": 4, "markersize": 7}
        ax.errorbar(difference.value, row, xerr=_errors([difference]), **style)
    ax.axvline(0, color=DARK, linewidth=1)
    ax.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=FONT_SIZE - 2)
    ax.set_xlabel("change in accuracy, with 95% interval")
    ax.grid(axis="x", alpha=0.3)
    return figure


def draw_all(path: Path) -> str:
    """Write the figures and tables of a file of results; returns the tables."""
    results = Results.load(path)
    drawings = {"accuracy": draw_accuracy, "curves": draw_curves, "data": draw_data, "ablations": draw_ablations}
    for name, draw in drawings.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(path.with_name(f"{path.stem}_{name}.png"), metadata={"Software": None})
    text = describe(results)
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    sys.stdout.write(draw_all(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "results" / "small.json")))
