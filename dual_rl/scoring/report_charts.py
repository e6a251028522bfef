"""Numbers of the charts on the page of a report. Pure; the page draws them, see html_report.js."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

NUM_BARS = 20
NUM_CALIBRATION_BINS = 10
NORMAL_QUANTILE = 1.959964
"""Of a 95% interval."""


Chart = dict[str, Any]
"""What the page draws.

`kind` bars: `edges`, n + 1 rising numbers (bar i holds its lower edge, the last its upper one too), and `series`, name
of a group -> its count in each bar, in the order in which they are stacked. `kind` points: `points`, each (`x`, `y`)
from `count` observations with the 95% interval `low`, `high` of y or None; `is_share`: both axes run from 0 to 1.
"""


def sigmoid(margin: float) -> float:
    """The Bradley-Terry probability that A is better, at any margin of float64."""
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    odds = math.exp(margin)
    return odds / (1 + odds)


def choose_width(span: float) -> float:
    """The smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... with which NUM_BARS bars cover `span`; 1 for none.

    Example: 9 takes 0.5, since 20 bars of 0.2 cover 4.
    """
    least = span / NUM_BARS
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def build_histogram(title: str, x_label: str, values: Sequence[float], groups: Sequence[str]) -> Chart | None:
    """How the values of each group spread; None without values. `groups`: of each value; stacked by name.

    Edges are multiples of the width, so that 0 is one if it is within. Example: values (-1, 0, 9) have edges -1, -0.5,
    0, ... 9, and lie in the first bar, the third and the last.
    """
    if not values:
        return None
    width = choose_width(max(values) - min(values))
    first = math.floor(min(values) / width)
    num_bars = max(1, math.ceil(max(values) / width) - first)
    series = {name: [0] * num_bars for name in sorted(set(groups))}
    for value, group in zip(values, groups, strict=True):
        series[group][min(math.floor(value / width) - first, num_bars - 1)] += 1
    edges = [(first + index) * width for index in range(num_bars + 1)]
    return {"kind": "bars", "title": title, "x_label": x_label, "edges": edges, "series": series}


def build_calibration(margins: Sequence[float], labels: Sequence[int]) -> Chart | None:
    """Probability that A is better, as Bradley-Terry has it, against the share of people's decisions; None without.

    `margins`: unscaled, reward of A less that of B. `labels`: +1, -1 and 0, a tie, which is left out. Bins of equal
    width in probability, empty ones left out; a point lies at its bin's mean probability. The interval is Wilson's.
    """
    decided = [(sigmoid(margin), label > 0) for margin, label in zip(margins, labels, strict=True) if label]
    if not decided:
        return None
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, is_a in decided:
        bins.setdefault(min(int(probability * NUM_CALIBRATION_BINS), NUM_CALIBRATION_BINS - 1), []).append(
            (probability, is_a)
        )
    points = []
    for _, members in sorted(bins.items()):
        share = fmean(is_a for _, is_a in members)
        low, high = compute_wilson(share, len(members))
        points.append(_point(fmean(probability for probability, _ in members), share, len(members), low, high))
    error = sum(point["count"] * abs(point["y"] - point["x"]) for point in points) / len(decided)
    return {
        "kind": "points",
        "title": "Calibration",
        "x_label": "probability of A by the rewards, sigmoid(margin)",
        "y_label": "share in which people prefer A",
        "points": points,
        "note": f"{len(decided)} pairs with a preference, ties left out; expected calibration error {error:.3f}; bars "
        "are 95% intervals, and a calibrated reward lies on the diagonal",
        "is_share": True,
    }


def _point(x: float, y: float, count: int, low: float | None = None, high: float | None = None) -> Chart:
    return {"x": x, "y": y, "count": count, "low": low, "high": high}


def compute_wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95% Wilson score interval of a share among `count`."""
    square = NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def build_means(title: str, y_label: str, steps: Sequence[int], values: Sequence[float | None]) -> Chart | None:
    """Mean of the values at each step; None without values, which are left out where they are None."""
    by_step: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return None
    points = [_point(step, fmean(found), len(found)) for step, found in sorted(by_step.items())]
    labels = {"title": title, "x_label": "step", "y_label": y_label}
    return {"kind": "points", **labels, "points": points, "note": "means over the generations that were logged"}
