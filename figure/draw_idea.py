"""Draws the idea of DeScore: `python figure/draw_idea.py` writes idea.png and idea.svg beside this file.

Only fonts that come with matplotlib are used and no dates are stored, so that the picture is the same everywhere.
Lengths are in percent of the picture's width; y grows upwards.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 100.0, 97.0
INCHES_PER_UNIT = 0.1
DPI = 160

INK = "#1b2430"
PAPER = "#ffffff"
PANEL = "#f5f6f8"
LINE = "#8a94a3"
INPUT = "#dde3ea"  # light, middle and dark, so that the three parts can be told apart in black and white
THINK = "#f0b64c"
SCORE = "#1d4e89"

SMALL, NORMAL, LARGE, TITLE = 15, 17, 20, 34
MASKED = "masked"
ROUND = "round,pad=0,rounding_size=1.1"

Point = tuple[float, float]


def draw_text(ax: Axes, center: Point, text: str, *, font: float = NORMAL, **style: object) -> None:
    """Text centred on a point."""
    ax.text(*center, text, fontsize=font, **{"ha": "center", "va": "center", "color": INK, "linespacing": 1.3} | style)


def draw_box(
    ax: Axes, corner: Point, size: Point, text: str = "", *, face: str = PAPER, edge: str = "", dashed=False, **font
) -> None:
    """A rounded box with centred text; dark boxes get light text."""
    style = {"linestyle": (0, (2.5, 1.8)) if dashed else "-", "linewidth": 2, "boxstyle": ROUND}
    ax.add_patch(FancyBboxPatch(corner, *size, facecolor=face, edgecolor=edge or face, **style))
    center = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    draw_text(ax, center, text, color=PAPER if face == SCORE else INK, **font)


def draw_arrow(ax: Axes, start: Point, end: Point, *, color: str = INK) -> None:
    """A straight arrow between two points."""
    style = "-|>,head_length=7,head_width=4.5"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, linewidth=2.4, color=color, shrinkA=0, shrinkB=0))


def draw_clip(ax: Axes, corner: Point, size: Point) -> None:
    """Three frames in which a ball rises to the right."""
    x, y = corner
    width, height = size
    draw_box(ax, corner, size, face=INPUT)
    frame_width, frame_height = (width - 4 * 1.2) / 3, height - 5.2
    for index in range(3):
        left, bottom = x + 1.2 + index * (frame_width + 1.2), y + 4
        frame = Rectangle((left, bottom), frame_width, frame_height, facecolor=PAPER, edgecolor=LINE, linewidth=1.2)
        ax.add_patch(frame)
        progress = 0.26 + 0.24 * index
        ax.add_patch(Circle((left + frame_width * progress, bottom + frame_height * progress), 0.95, facecolor=INK))
    draw_text(ax, (x + width / 2, y + 2), "video")


def draw_model(ax: Axes) -> None:
    """Upper half: one forward of the model over the scored sequence, with its two outputs."""
    y_tokens, y_model, y_output = 53, 68, 80.5
    draw_clip(ax, (3, y_tokens), (22, 10))
    draw_box(ax, (26.5, y_tokens), (15.5, 10), "prompt", face=INPUT)
    draw_box(ax, (43.5, y_tokens), (34, 10), "chain of thought", face=THINK)
    draw_box(ax, (79, y_tokens), (18, 10), "<Reward>", face=SCORE, weight="bold")
    draw_box(ax, (3, y_model), (94, 7.5), "vision-language model", edge=INK, font=LARGE, weight="bold")
    for x in (14, 34.25, 60.5, 88):
        draw_arrow(ax, (x, y_tokens + 10.7), (x, y_model - 0.7))
    for x in (60.5, 88):
        draw_arrow(ax, (x, y_model + 8.2), (x, y_output - 0.7))
    draw_box(ax, (43.5, y_output), (34, 9), "writes the next word", edge=THINK)
    draw_box(ax, (79, y_output), (18, 9), "linear head\ngives r", edge=SCORE, font=SMALL)
    draw_text(ax, (60.5, y_output + 11.6), "1  think", font=LARGE, weight="bold")
    draw_text(ax, (88, y_output + 11.6), "2  score", font=LARGE, weight="bold")


def draw_sequence(
    ax: Axes, corner: Point, *, thought: str = "CoT", video: str = "", score: str = "r", copies: int = 1
) -> None:
    """A small scored sequence, 25 wide and 5 high; further copies of its answer lie behind it."""
    x, y = corner
    is_masked = thought == MASKED
    rim = PANEL if copies > 1 else None
    draw_box(ax, (x, y), (5, 5), video, face=INPUT, edge=rim, font=SMALL, weight="bold")
    if not video:
        ax.add_patch(Polygon([(x + 1.7, y + 1.3), (x + 1.7, y + 3.7), (x + 3.7, y + 2.5)], facecolor=INK))
    for shift in (0.9 * index for index in reversed(range(copies))):
        face, edge = (PAPER, LINE) if is_masked else (THINK, rim)
        text = "" if shift else thought
        draw_box(ax, (x + 6, y + shift), (12.5, 5), text, face=face, edge=edge, font=SMALL, dashed=is_masked)
        text = "" if shift else score
        draw_box(ax, (x + 19.5, y + shift), (6, 5), text, face=SCORE, edge=rim, font=SMALL, weight="bold")


def draw_column(ax: Axes, left: float, *, title: str, subtitle: str) -> None:
    """The panel of one step of the recipe, 29 wide."""
    draw_box(ax, (left, 2), (29, 44), face=PANEL)
    draw_text(ax, (left + 14.5, 41.1), title, font=LARGE, weight="bold", va="baseline")
    draw_text(ax, (left + 14.5, 37.4), subtitle, font=SMALL, va="baseline")


def draw_recipe(ax: Axes) -> None:
    """Lower half: what the two stages train, and how the model is used."""
    first, second, third = 3.0, 35.5, 68.0
    inset, objective = 1.75, (25.5, 7)
    draw_column(ax, first, title="Stage 1", subtitle="cold start")
    draw_sequence(ax, (first + inset, 29.5))
    draw_sequence(ax, (first + inset, 23), thought=MASKED)
    draw_text(ax, (first + 14.5, 15.8), "half the time\nwithout the CoT", font=SMALL)
    draw_box(ax, (first + inset, 4), objective, "Bradley-Terry\non the score", face=SCORE, font=SMALL)

    draw_column(ax, second, title="Stage 2", subtitle="dual-objective RL")
    draw_sequence(ax, (second + inset, 28.5), copies=3)
    draw_text(ax, (second + 14.5, 23.2), "one forward for both", font=SMALL)
    draw_box(ax, (second + inset, 12.3), objective, "GRPO\non the CoT", face=THINK, font=SMALL)
    draw_box(ax, (second + inset, 4), objective, "Bradley-Terry\non the score", face=SCORE, font=SMALL)

    draw_column(ax, third, title="Inference", subtitle="think, then score")
    draw_sequence(ax, (third + inset, 29.5), video="A", score="2.7")
    draw_sequence(ax, (third + inset, 23), video="B", score="0.4")
    draw_text(ax, (third + 14.5, 15.8), "2.7 > 0.4", font=SMALL)
    draw_box(ax, (third + inset, 4), objective, "A is better", edge=INK, font=SMALL, weight="bold")
    for left in (first, second):
        draw_arrow(ax, (left + 29.2, 24), (left + 32.2, 24))


def draw_idea() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(WIDTH * INCHES_PER_UNIT, HEIGHT * INCHES_PER_UNIT), facecolor=PAPER)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    draw_text(ax, (3, 91.6), "DeScore", font=TITLE, ha="left", weight="bold")
    draw_text(ax, (3, 84.2), "a video reward model\nthat thinks, then scores", font=NORMAL, ha="left")
    draw_model(ax)
    draw_recipe(ax)
    return figure


def main() -> None:
    mpl.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "descore"})
    folder = Path(__file__).resolve().parent
    figure = draw_idea()
    figure.savefig(folder / "idea.png", dpi=DPI, metadata={"Software": None})
    figure.savefig(folder / "idea.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
