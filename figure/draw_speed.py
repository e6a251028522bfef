"""Draws how fast training and scoring are, from the committed results of the benchmarks alone.

    python figure/draw_speed.py

Writes speed.png (against the original's algorithm) and growth.png (time and memory as the work grows, and what a
second GPU gives) beside this file. The style is that of draw_evidence.py.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from draw_evidence import BRIGHT, DARK, FONT_SIZE, LIGHT, MIDDLE, PALE, new_figure  # noqa: E402

STAGE1, STAGE2 = HERE.parent / "cold_start/benchmarks/results", HERE.parent / "dual_rl/benchmarks/results"
STEP_PAIRS, STEP_N = 8, 8
"""Of lora64_h100.json: the defaults of train_8b.sh."""
PHASES = {"ours": ("generate", "prepare", "update", "hand_over"), "original": ("old", "reference", "update")}
PARTS = {  # of a step: its phases, color, hatch
    "writing thoughts": (("generate",), PALE, ""),
    "vision and log-probs": (("prepare", "old", "reference"), LIGHT, ".."),
    "update": (("update",), MIDDLE, ""),
    "handing weights over": (("hand_over",), BRIGHT, "//"),
}
STEPS = {"ours": "ours,\nmeasured", "original": "original,\ncomposed*"}
COMPOSED = "* the original's passes over one pair were measured,\nand scaled to the tokens of the step"
AXES = {  # label, what a unit of it is
    "n": ("responses per video", 1),
    "response_tokens": ("hundred tokens per response", 100),
    "frames": ("frames per video", 1),
    "pairs": ("pairs per step", 1),
}
SCALED = {"step": "whole step", "generate": "responses", "prepare": "reference", "update": "update",
          "hand_over": "hand-over"}  # fmt: skip
SMALL = FONT_SIZE - 2


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def compose_steps(median: Mapping[str, float], original: Mapping) -> dict[str, dict[str, float]]:
    """Seconds by phase of a whole step of ours, as measured, and of the original's algorithm.

    `median`: of summarize.py; `original`: part of a result of update_8b.py. The original's step has the same rollouts,
    no hand-over, and its passes over one pair scaled to the tokens of a step in which every response has its own copy
    of the prompt. That takes attention as linear, which leaves out a few percent, and the vision tower as growing with
    the tokens, which adds about as much.
    """
    response = median["response_length/mean"] + 1
    prompt = median["perf/packed_tokens"] / (2 * STEP_PAIRS) - STEP_N * response
    scale = 2 * STEP_PAIRS * STEP_N * (prompt + response) / original["tokens"]
    ours = {phase: median[f"timing/seconds/{phase}"] for phase in PHASES["ours"]}
    theirs = {phase: original["seconds"][phase] * scale for phase in PHASES["original"]}
    return {"ours": ours, "original": {"generate": ours["generate"], **theirs}}


def draw_speed() -> Figure:
    """Bars of speed-ups, and below where the seconds of a whole step go."""
    update = read(STAGE2 / "update_h100.json")
    steps = compose_steps(read(STAGE2 / "lora64_h100.json")["median"], update["original"])
    speedups = {  # value, color, hatch
        "stage 1:\ntraining step": (read(STAGE1 / "step_h100.json")["speedup"], LIGHT, ".."),
        "stage 2:\nupdate": (update["speedup"], MIDDLE, ""),
        "stage 2:\nwhole step*": (sum(steps["original"].values()) / sum(steps["ours"].values()), "white", "//"),
        "scoring\nvideos": (read(STAGE2 / "score_h100.json")["speedup"], PALE, ""),
    }
    heights = [1.0 + 0.55 * len(speedups), 2.7]
    figure = new_figure(sum(heights))
    figure.get_layout_engine().set(h_pad=0.12)
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    for index, (value, color, hatch) in enumerate(speedups.values()):
        top.barh(index, value, 0.7, color=color, hatch=hatch, edgecolor=DARK)
        top.text(value, index, f" {value:.1f}x", va="center", fontsize=FONT_SIZE, fontweight="bold")
    top.axvline(1, color=DARK, linestyle=":", linewidth=1)
    top.set_xlim(0, 1.2 * max(value for value, *_ in speedups.values()))
    top.set_title("times as fast as the original's algorithm", loc="left", fontsize=FONT_SIZE)
    top.set_xlabel("8B model, one H100 (dotted line: equally fast)", fontsize=SMALL)
    _label_bars(top, list(speedups), FONT_SIZE - 1)
    _draw_steps(bottom, steps)
    figure.supxlabel(COMPOSED, fontsize=SMALL, x=0.02, ha="left")
    return figure


def _draw_steps(ax: Axes, steps: Mapping[str, Mapping[str, float]]) -> None:
    ends = dict.fromkeys(STEPS, 0.0)
    for label, (phases, color, hatch) in PARTS.items():
        lengths = {name: sum(steps[name].get(phase, 0.0) for phase in phases) for name in STEPS}
        original = f"{lengths['original']:.1f} s" if lengths["original"] else "not counted"
        style = {"color": color, "hatch": hatch, "edgecolor": DARK}
        label = f"{label}: ours {lengths['ours']:.1f} s, original {original}"
        ax.barh([0, 1], list(lengths.values()), 0.7, left=list(ends.values()), label=label, **style)
        ends = {name: ends[name] + lengths[name] for name in STEPS}
    for index, end in enumerate(ends.values()):
        ax.text(end, index, f" {end:.0f} s", va="center", fontsize=FONT_SIZE, fontweight="bold")
    ax.set_xlim(0, 1.2 * max(ends.values()))
    ax.set_title("seconds of a whole step of stage 2", loc="left", fontsize=FONT_SIZE)
    position = {"loc": "upper left", "bbox_to_anchor": (-0.27, -0.13)}  # under the labels as well
    ax.legend(**position, frameon=False, fontsize=SMALL, handleheight=1.3)
    _label_bars(ax, list(STEPS.values()), FONT_SIZE - 1)


def draw_growth() -> Figure:
    """A row for each way in which work grows: seconds on the left, least memory on the right; below, a second GPU."""
    growth = read(STAGE2 / "growth_h100.json")["growth"]
    heights = [1.75] * len(AXES) + [2.1]
    figure = new_figure(0.9 + sum(heights))
    rows = [[f"{axis} seconds", f"{axis} memory"] for axis in AXES]
    panels = figure.subplot_mosaic([*rows, ["gpus", "gpus"]], height_ratios=heights)
    for axis, (label, unit) in AXES.items():
        values = [np.mean(row[axis]) / unit for row in growth[axis]]
        seconds = [sum(row["seconds"].values()) for row in growth[axis]]
        memory = [row["least_memory_gib"] for row in growth[axis]]
        for name, points in (("seconds", seconds), ("memory", memory)):
            ax = panels[f"{axis} {name}"]
            ax.plot(values, points, "o-", color=MIDDLE, markersize=6, linewidth=1.6)
            ax.set_xticks(values, [f"{value:g}" for value in values], fontsize=SMALL)
            ax.set_xlabel(label, fontsize=SMALL)
            ax.tick_params(axis="y", labelsize=SMALL)
            ax.set_ylim(0, 1.15 * max(points))
            ax.grid(alpha=0.3)
    panels["n seconds"].set_title("seconds", loc="left", fontsize=FONT_SIZE)
    panels["n memory"].set_title("least memory, GiB", loc="left", fontsize=FONT_SIZE)
    _draw_second_gpu(panels["gpus"])
    figure.suptitle("Stage 2 after the rollouts: 8B model, one H100", fontsize=FONT_SIZE)
    return figure


def _draw_second_gpu(ax: Axes) -> None:
    one, two = (read(STAGE2 / f"scaling_{gpus}xh100.json")["median"] for gpus in (1, 2))
    for index, phase in enumerate(SCALED):
        ratio = one[f"timing/seconds/{phase}"] / two[f"timing/seconds/{phase}"]
        ax.barh(index, ratio, 0.7, color=LIGHT, edgecolor=DARK)
        ax.text(0.04, index, f"{ratio:.2f}", va="center", fontsize=SMALL, fontweight="bold")
    ax.axvline(2, color=DARK, linestyle=":", linewidth=1)
    ax.set_xlim(0, 2.1)
    ax.set_title("a step on two GPUs: times as fast as on one", loc="left", fontsize=FONT_SIZE)
    _label_bars(ax, list(SCALED.values()), SMALL)


def _label_bars(ax: Axes, labels: list[str], size: int) -> None:
    """Labels for bars 0, 1, ... from the top down, and no frame on the far sides."""
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.invert_yaxis()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="x", labelsize=SMALL)


if __name__ == "__main__":
    for name, draw in {"speed": draw_speed, "growth": draw_growth}.items():
        draw().savefig(HERE / f"{name}.png", metadata={"Software": None})
        sys.stdout.write(f"{HERE / name}.png\n")
