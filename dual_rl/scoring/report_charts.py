"""Numbers of the charts on a report's page. Pure; the page draws them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

NUM_BARS = 20
NUM_CALIBRATION_BINS = 10

Chart = dict[str, Any]


def sigmoid(margin: float) -> float:
    """The Bradley-Terry probability that A is better, without overflow at any margin."""
    return (1 + math.tanh(margin / 2)) / 2


def build_histogram(title: str, x_label: str, values: Sequence[float | None], groups: Sequence[str]) -> Chart | None:
    """Distribution of the values, stacked by their `groups`; None without values. Values of None are left out.

    `edges`, n + 1 rising numbers (bar i includes its lower edge, the last its upper one too), are multiples of the
    width (1, 2 or 5 times a power of ten), so that 0 is one if it is in range. `series`: name of a group -> its
    count in each bar. Example: values (-1, 0, 9) have edges -1, -0.5, 0, ... 9: first, third and last bar.
    """
    known: dict[str, list[float]] = {}
    for value, group in sorted(zip(values, groups, strict=True), key=lambda pair: pair[1]):
        if value is not None:
            known.setdefault(group, []).append(value)
    if not known:
        return None
    lowest, highest = min(map(min, known.values())), max(map(max, known.values()))
    least = (highest - lowest) / NUM_BARS
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first = math.floor(lowest / width)
    edges = [index * width for index in range(first, max(math.ceil(highest / width), first + 1) + 1)]
    series = {name: np.histogram(found, edges)[0].tolist() for name, found in known.items()}
    return {"kind": "bars", "title": title, "x_label": x_label, "edges": edges, "series": series}


def build_calibration(margins: Sequence[float | None], labels: Sequence[int | None]) -> Chart | None:
    """Bradley-Terry probability that A is better against the share of people who say so; None without decided pairs.

    `margins`: unscaled, reward of A minus that of B. `labels`: +1, -1, or 0 for a tie. Ties and pairs with a None are
    left out. Bins have equal width in probability. `points`: per bin its mean probability `x` and the share `y` of its
    `count` pairs.
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
        probability, share = np.mean(members, axis=0).tolist()
        points.append({"x": probability, "y": share, "count": len(members)})
    num_decided = sum(point["count"] for point in points)
    error = sum(point["count"] * abs(point["y"] - point["x"]) for point in points) / num_decided
    note = f"{num_decided} pairs with a preference, ties left out; expected calibration error {error:.3f}"
    return {
        "kind": "points",
        "title": "Calibration",
        "x_label": "probability of A by the rewards, sigmoid(margin)",
        "y_label": "share in which people prefer A",
        "points": points,
        "note": f"{note}; a calibrated reward lies on the diagonal",
    }
