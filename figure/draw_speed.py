"""Draws how fast training and scoring are, from the committed results of the benchmarks alone.

    python figure/draw_speed.py

Writes speed.png (against the original's algorithm) and growth.png (time and memory as the work grows, measured and by
dual_rl/benchmarks/predict_8b.py, and what a second GPU gives) beside this file. A result that is missing is left out.
The style is that of draw_evidence.py: things are told apart by markers, lines and hatches, not by color alone, at the
width of a phone.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from draw_evidence import BRIGHT, DARK, DPI, FONT_SIZE, LIGHT, MIDDLE, PALE, WIDTH  # noqa: E402

COST_MODEL = "dual_rl/benchmarks/results/cost_model.json"
SPEEDUPS = {  # file, where in it, color, hatch
    "stage 1:\ntraining step": ("cold_start/benchmarks/results/step_h100.json", ("speedup",), LIGHT, ".."),
    "stage 2:\nupdate": ("dual_rl/benchmarks/results/update_h100.json", ("speedup",), MIDDLE, ""),
    "stage 2:\nwhole step*": (COST_MODEL, ("against_original", "ratio"), "white", "//"),
    "scoring\nvideos": ("dual_rl/benchmarks/results/score_h100.json", ("speedup",), PALE, ""),
}
PARTS = {  # of a step: phases of cost_model.json, color, hatch
    "writing thoughts": (("generate",), PALE, ""),
    "vision and log-probs": (("prepare", "old", "reference"), LIGHT, ".."),
    "update": (("update",), MIDDLE, ""),
    "handing weights over": (("hand_over",), BRIGHT, "//"),
}
STEPS = {"ours": "ours,\nmeasured", "original": "original,\ncomposed*"}
COMPOSED = "* the original's passes over one pair were measured,\nand scaled to the tokens of the step"
AXES = {  # label, what a unit of it is
    "n": ("responses a video", 1),
    "response_tokens": ("hundred tokens a response", 100),
    "frames": ("frames a video", 1),
    "pairs": ("pairs a step", 1),
}
SCALED = {  # phases of a step whose speed on two GPUs is shown, and their labels
    "step": "whole step",
    "generate": "responses",
    "prepare": "reference",
    "update": "update",
    "hand_over": "hand-over",
}
SCALING = {gpus: f"dual_rl/benchmarks/results/scaling_{gpus}xh100.json" for gpus in (1, 2)}
SMALL = FONT_SIZE - 2


def read_result(root: Path, name: str) -> dict | None:
    """A JSON file of the repository at `root`; None where it does not exist."""
    path = root / name
    return json.loads(path.read_text()) if path.exists() else None


def read_speedups(root: Path) -> dict[str, float]:
    """By label, how many times as fast as the original's algorithm."""
    speedups = {}
    for label, (name, keys, *_) in SPEEDUPS.items():
        value = read_result(root, name)
        if value is not None:
            for key in keys:
                value = value[key]
            speedups[label] = value
    return speedups


def read_scaling(root: Path) -> dict[int, dict[str, float]]:
    """Seconds by phase, for one and two GPUs; nothing where one is missing."""
    results = {gpus: read_result(root, name) for gpus, name in SCALING.items()}
    if not all(results.values()):
        return {}
    return {
        gpus: {phase: result["median"][f"timing/seconds/{phase}"] for phase in SCALED}
        for gpus, result in results.items()
    }


def draw_speed(root: Path) -> Figure | None:
    """Bars of speed-ups, and below where the seconds of a whole step go."""
    speedups, costs = read_speedups(root), read_result(root, COST_MODEL)
    if not speedups:
        return None
    heights = [1.0 + 0.55 * len(speedups), *([2.7] if costs else [])]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_speedups(panels[0], speedups)
    if costs:
        _draw_steps(panels[1], costs["against_original"])
        figure.supxlabel(COMPOSED, fontsize=SMALL, x=0.02, ha="left")
    return figure


def _draw_speedups(ax: Axes, speedups: dict[str, float]) -> None:
    for place, (label, value) in enumerate(speedups.items()):
        _, _, color, hatch = SPEEDUPS[label]
        ax.barh(place, value, 0.7, color=color, hatch=hatch, edgecolor=DARK)
        ax.text(value, place, f" {value:.1f}x", va="center", fontsize=FONT_SIZE, fontweight="bold")
    ax.axvline(1, color=DARK, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(speedups)), list(speedups), fontsize=FONT_SIZE - 1)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max(speedups.values()))
    ax.set_title("times as fast as the original's algorithm", loc="left", fontsize=FONT_SIZE)
    ax.set_xlabel("8B model, one H100 (dotted line: equally fast)", fontsize=SMALL)
    _strip(ax)


def _draw_steps(ax: Axes, seconds: dict) -> None:
    """`seconds`: of ours and the original, by phase."""
    totals = {}
    for place, name in enumerate(STEPS):
        start = 0.0
        for label, (phases, color, hatch) in PARTS.items():
            length = sum(seconds[name].get(phase, 0.0) for phase in phases)
            ax.barh(place, length, 0.7, left=start, color=color, hatch=hatch, edgecolor=DARK)
            totals[label, name] = length
            start += length
        ax.text(start, place, f" {start:.0f} s", va="center", fontsize=FONT_SIZE, fontweight="bold")
    ax.set_yticks(range(len(STEPS)), list(STEPS.values()), fontsize=FONT_SIZE - 1)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * sum(seconds["original"].values()))
    ax.set_title("seconds of a whole step of stage 2", loc="left", fontsize=FONT_SIZE)
    handles = [
        ax.barh(0, 0, color=color, hatch=hatch, edgecolor=DARK, label=_describe_part(label, totals))
        for label, (_, color, hatch) in PARTS.items()
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (-0.27, -0.13)}  # under the labels as well
    ax.legend(handles=handles, **place, frameon=False, fontsize=SMALL, handleheight=1.3)
    _strip(ax)


def _describe_part(label: str, totals: dict[tuple[str, str], float]) -> str:
    ours, original = (totals[label, name] for name in STEPS)
    return f"{label}: ours {ours:.1f} s, original " + (f"{original:.1f} s" if original else "not counted")


def draw_growth(root: Path) -> Figure | None:
    """A row for each way in which work grows: seconds on the left, least memory on the right; below, more GPUs."""
    costs, steps = read_result(root, COST_MODEL), read_scaling(root)
    rows = {axis: [row for row in costs["rows"] if row["axis"] == axis] for axis in AXES} if costs else {}
    rows = {axis: points for axis, points in rows.items() if points}
    if not rows:
        return None
    heights = [1.75] * len(rows) + ([2.1] if steps else [])
    figure = Figure(figsize=(WIDTH, 0.9 + sum(heights)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    if steps:
        _draw_gpus(panels[-1], steps, costs["on_paper"])
    for (seconds, memory), (axis, points) in zip(panels[: len(rows)], rows.items(), strict=True):
        for ax, measured, model in ((seconds, "seconds", "on_paper"), (memory, "least_gib", "gib_fitted")):
            label, unit = AXES[axis]
            values = [row["value"] / unit for row in points]
            ax.plot(values, [row[model] for row in points], "-", color=BRIGHT, linewidth=1.6, label="model")
            ax.plot(values, [row[measured] for row in points], "o", color=MIDDLE, markersize=6, label="measured")
            ax.set_xticks(values, [f"{value:g}" for value in values], fontsize=SMALL)
            ax.set_xlabel(label, fontsize=SMALL)
            ax.tick_params(axis="y", labelsize=SMALL)
            ax.set_ylim(0, 1.15 * max(max(row[measured], row[model]) for row in points))
            ax.grid(alpha=0.3)
    panels[0, 0].set_title("seconds", loc="left", fontsize=FONT_SIZE)
    panels[0, 1].set_title("least memory, GiB", loc="left", fontsize=FONT_SIZE)
    panels[0, 0].legend(frameon=False, fontsize=SMALL, loc="upper left")
    figure.suptitle("Stage 2 after the rollouts: 8B model, one H100", fontsize=FONT_SIZE)
    return figure


def _draw_gpus(panels: Sequence[Axes], seconds: dict[int, dict[str, float]], on_paper: Sequence[dict]) -> None:
    """Times as fast as one GPU: the whole step, and by phase with two. `seconds`: by number of GPUs, then phase."""
    paper = {row["value"]: row["step"] for row in on_paper if row["axis"] == "gpus"}
    step, phases = panels
    step.plot(list(paper), [paper[1] / value for value in paper.values()], "-", color=BRIGHT, linewidth=1.6)
    measured = [seconds[1]["step"] / seconds[gpus]["step"] for gpus in seconds]
    step.plot(list(seconds), measured, "o", color=MIDDLE, markersize=6)
    step.set_xticks(list(paper), [f"{gpus:g}" for gpus in paper], fontsize=SMALL)
    step.tick_params(axis="y", labelsize=SMALL)
    step.set_ylim(0, None)
    step.set_xlabel("GPUs", fontsize=SMALL)
    step.grid(alpha=0.3)
    step.set_title("step, times as fast", loc="left", fontsize=FONT_SIZE)
    for place, name in enumerate(SCALED):
        ratio = seconds[1][name] / seconds[2][name]
        phases.barh(place, ratio, 0.7, color=LIGHT, edgecolor=DARK)
        phases.text(0.04, place, f"{ratio:.2f}", va="center", fontsize=SMALL, fontweight="bold")
    phases.axvline(2, color=DARK, linestyle=":", linewidth=1)
    phases.set_yticks(range(len(SCALED)), list(SCALED.values()), fontsize=SMALL)
    phases.invert_yaxis()
    phases.set_xlim(0, 2.1)
    phases.set_xlabel("times as fast as on one", fontsize=SMALL)
    phases.set_title("two GPUs, a step", loc="left", fontsize=FONT_SIZE)
    _strip(phases)


def _strip(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="x", labelsize=SMALL)


def draw_all(root: Path, folder: Path) -> list[Path]:
    """Draw the results of the repository at `root` into `folder`; returns the pictures."""
    pictures = []
    for name, draw in {"speed": draw_speed, "growth": draw_growth}.items():
        figure = draw(root)
        if figure is not None:
            pictures.append(folder / f"{name}.png")
            figure.savefig(pictures[-1], metadata={"Software": None})
    return pictures


if __name__ == "__main__":
    for picture in draw_all(HERE.parent, HERE):
        sys.stdout.write(f"{picture}\n")
