"""Numbers of a report's charts, worked out by hand."""

import pytest

from scoring.report_charts import (
    build_calibration,
    build_histogram,
    build_means,
    choose_width,
    compute_wilson,
    sigmoid,
)


def test_bars_by_hand():
    assert [choose_width(span) for span in (9, 20, 20.1, 0.3, 0)] == [0.5, 1, 2, pytest.approx(0.02), 1]
    bars = build_histogram("t", "x", [-1.0, 0.0, 0.49, 9.0, -0.0001], ["right", "wrong", "tie", "right", "right"])
    assert (bars["edges"][:3], bars["edges"][-1], len(bars["edges"])) == ([-1.0, -0.5, 0.0], 9.0, 21)
    assert {name: [n for n, count in enumerate(counts) if count] for name, counts in bars["series"].items()} == {
        "right": [0, 1, 19],
        "tie": [2],
        "wrong": [2],
    }
    for values in ([2.5, 2.5], [2.0]):
        bars = build_histogram("t", "x", values, ["a"] * len(values))
        assert (bars["edges"], bars["series"]) == ([2.0, 3.0], {"a": [len(values)]})
    assert build_histogram("t", "x", [], []) is None


def test_the_calibration_curve_by_hand():
    # sigmoid: 0.5, 0.5, 0.5, 0.7311, 0.7685, 0 and 1; bins 5, 7, 0 and 9. The tie is left out.
    curve = build_calibration([0.0, 0.0, 0.0, 1.0, 1.2, -800.0, 800.0, 0.1], [1, 1, -1, -1, 1, -1, 1, 0])
    assert [(point["count"], point["y"]) for point in curve["points"]] == [(1, 0.0), (3, 2 / 3), (2, 0.5), (1, 1.0)]
    assert [point["x"] for point in curve["points"]] == pytest.approx([0.0, 0.5, (0.7310586 + 0.7685248) / 2, 1.0])
    # (3 x 0.1667 + 2 x 0.2498) / 7
    assert curve["note"].startswith("7 pairs with a preference, ties left out; expected calibration error 0.143")
    assert compute_wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert compute_wilson(0.0, 3) == pytest.approx((0.0, 0.5615), abs=1e-4)
    assert build_calibration([1.0], [0]) is None
    means = build_means("t", "y", [0, 20, 0, 20], [1.0, None, 3.0, 5.0])["points"]
    assert [(point["x"], point["y"], point["count"]) for point in means] == [(0, 2.0, 2), (20, 5.0, 1)]


def test_probabilities_are_those_of_any_margin():
    assert [sigmoid(margin) for margin in (0.0, 1e308, -1e308)] == [0.5, 1.0, 0.0]
    assert sigmoid(2.0) == pytest.approx(0.8807971)
    assert sigmoid(-2.0) == pytest.approx(1 - 0.8807971)
