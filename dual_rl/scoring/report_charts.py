"""Numbers of the charts on a report's page. Pure; the page draws them."""

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

`kind` bars: `edges`, n + 1 rising numbers (bar i includes its lower edge, the last its upper one too), and `series`,
name of a group -> its count in each bar, stacked in this order. `kind` points: `points`, each (`x`, `y`) from `count`
observations with the 95% interval `low`, `high` of y or None; `is_share`: both axes run from 0 to 1.
"""


def sigmoid(margin: float) -> float:
    """The Bradley-Terry probability that A is better, without overflow at any margin."""
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    odds = math.exp(margin)
    return odds / (1 + odds)


def _choose_width(span: float) -> float:
    """The smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... with which NUM_BARS bars cover `span`; 1 for none."""
    least = span / NUM_BARS
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def build_histogram(title: str, x_label: str, values: Sequence[float | None], groups: Sequence[str]) -> Chart | None:
    """Distribution of the values, stacked by their `groups`; None without values. Values of None are left out.

    Edges are multiples of the width, so that 0 is one if it is in range. Example: values (-1, 0, 9) have edges -1,
    -0.5, 0, ... 9, and fall into the first bar, the third and the last.
    """
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value is not None]
    if not known:
        return None
    lowest, highest = min(known)[0], max(known)[0]
    width = _choose_width(highest - lowest)
    first = math.floor(lowest / width)
    num_bars = max(1, math.ceil(highest / width) - first)
    series = {name: [0] * num_bars for name in sorted({group for _, group in known})}
    for value, group in known:
        series[group][min(math.floor(value / width) - first, num_bars - 1)] += 1
    edges = [(first + index) * width for index in range(num_bars + 1)]
    return {"kind": "bars", "title": title, "x_label": x_label, "edges": edges, "series": series}


def build_calibration(margins: Sequence[float | None], labels: Sequence[int | None]) -> Chart | None:
    """Bradley-Terry probability that A is better against the share of people who say so; None without decided pairs.

    `margins`: unscaled, reward of A minus that of B. `labels`: +1, -1, or 0 for a tie. Ties and pairs with a None are
    left out. Bins have equal width in probability; a point is at its bin's mean probability with Wilson's interval.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin, label in zip(margins, labels, strict=True):
        if label and margin is not None:
            probability = sigmoid(margin)
            index = min(int(probability * NUM_CALIBRATION_BINS), NUM_CALIBRATION_BINS - 1)
            bins.setdefault(index, []).append((probability, label > 0))
    if not bins:
        return None
    points = []
    for _, members in sorted(bins.items()):
        probabilities, decisions = zip(*members, strict=True)
        share = fmean(decisions)
        points.append(_point(fmean(probabilities), share, len(members), *compute_wilson(share, len(members))))
    num_decided = sum(point["count"] for point in points)
    error = sum(point["count"] * abs(point["y"] - point["x"]) for point in points) / num_decided
    return {
        "kind": "points",
        "title": "Calibration",
        "x_label": "probability of A by the rewards, sigmoid(margin)",
        "y_label": "share in which people prefer A",
        "points": points,
        "note": f"{num_decided} pairs with a preference, ties left out; expected calibration error {error:.3f}; bars "
        "are 95% intervals, and a calibrated reward lies on the diagonal",
        "is_share": True,
    }


def _point(x: float, y: float, count: int, low: float | None = None, high: float | None = None) -> Chart:
    return {"x": x, "y": y, "count": count, "low": low, "high": high}


def compute_wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95% Wilson score interval of a share of `count`."""
    square = NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def build_means(title: str, y_label: str, steps: Sequence[int], values: Sequence[float | None]) -> Chart | None:
    """Mean of the values at each step, leaving out values of None; None without values."""
    by_step: dict[int, list[float]] = {}
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return None
    points = [_point(step, fmean(found), len(found)) for step, found in sorted(by_step.items())]
    labels = {"title": title, "x_label": "step", "y_label": y_label}
    return {"kind": "points", **labels, "points": points, "note": "means over the generations that were logged"}
