"""Figures of speed show the committed results."""

import json

from draw_speed import STAGE1, STAGE2, compose_steps, draw_growth, draw_speed, read


def texts(ax) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def test_original_step_by_hand():
    """16 videos with prompts of 990 tokens and 8 responses of 10: 17,120 tokens packed, 128,000 with every prompt."""
    median = {"perf/packed_tokens": 17_120, "response_length/mean": 9.0}
    ours = {"generate": 5.0, "prepare": 2.0, "update": 6.0, "hand_over": 1.0}
    median |= {f"timing/seconds/{name}": seconds for name, seconds in {**ours, "step": 99.0}.items()}
    original = {"tokens": 32_000, "seconds": {"old": 2.0, "reference": 1.0, "update": 8.0, "loss": 0.5}}
    steps = compose_steps(median, original)
    assert steps == {"ours": ours, "original": {"generate": 5.0, "old": 8.0, "reference": 4.0, "update": 32.0}}


def test_every_bar_has_the_number_of_the_committed_result():
    speedups, steps = draw_speed().axes
    files = (STAGE1 / "step_h100.json", STAGE2 / "update_h100.json", STAGE2 / "score_h100.json")
    stage1, update, scoring = (f"{read(path)['speedup']:.1f}x" for path in files)
    assert texts(speedups) == [stage1, update, "6.7x", scoring]
    assert texts(steps) == ["38 s", "253 s"]
    legend = [text.get_text() for text in steps.get_legend().get_texts()]
    assert "update: ours 13.2 s, original 183.3 s" in legend
    assert "handing weights over: ours 0.6 s, original not counted" in legend


def test_growth_shows_what_was_measured():
    panels = draw_growth().axes
    rows = json.loads((STAGE2 / "growth_h100.json").read_text())["growth"]["pairs"]
    seconds = next(panel.lines[0] for panel in panels if list(panel.lines[0].get_xdata()) == [1, 2, 4])
    assert list(seconds.get_ydata()) == [sum(row["seconds"].values()) for row in rows]
