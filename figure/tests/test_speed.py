"""Figures of speed: drawn from committed results alone, and without what is missing."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from draw_speed import (
    AXES,
    COST_MODEL,
    PARTS,
    SCALED,
    SCALING,
    SPEEDUPS,
    draw_all,
    draw_growth,
    draw_speed,
    read_scaling,
    read_speedups,
)

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted({name for name, *_ in SPEEDUPS.values()})
SCORES = next(name for name in FILES if "score" in name)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A repository of committed results only."""
    for name in (*FILES, *SCALING.values()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def texts(ax) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def test_committed_results_give_both_pictures_with_every_glyph(copied):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = draw_all(copied, copied)
    assert [picture.name for picture in pictures] == ["speed.png", "growth.png"]
    assert all((REPOSITORY / "figure" / picture.name).is_file() for picture in pictures)


def test_every_bar_has_its_number(copied):
    speedups, steps = draw_speed(copied).axes
    result = {name: json.loads((copied / name).read_text()) for name in FILES}
    values = [result[name]["speedup"] for name in FILES if name != COST_MODEL]
    values.append(result[COST_MODEL]["against_original"]["ratio"])
    assert sorted(texts(speedups)) == sorted(f"{value:.1f}x" for value in values)
    seconds = result[COST_MODEL]["against_original"]
    assert texts(steps) == [f"{sum(seconds[name].values()):.0f} s" for name in ("ours", "original")]
    legend = [text.get_text() for text in steps.get_legend().get_texts()]
    assert [text.partition(":")[0] for text in legend] == list(PARTS)
    assert f"original {seconds['original']['update']:.1f} s" in " ".join(legend)


def test_the_parts_of_a_step_are_all_of_it():
    seconds = json.loads((REPOSITORY / COST_MODEL).read_text())["against_original"]
    shown = {phase for phases, *_ in PARTS.values() for phase in phases}
    assert shown == {*seconds["ours"], *seconds["original"]}


@pytest.mark.parametrize("styles", [SPEEDUPS, PARTS], ids=["speed-ups", "parts"])
def test_bars_are_told_apart_without_color(styles):
    """By their hatch, or as the only plain dark and the only plain light ones."""
    looks = [(hatch, color == "#1d4e89") for *_, color, hatch in styles.values()]
    assert len(set(looks)) == len(looks)


def test_a_result_that_is_missing_is_left_out(copied):
    (copied / SCORES).unlink()
    assert list(read_speedups(copied)) == [label for label, (name, *_) in SPEEDUPS.items() if name != SCORES]
    assert len(texts(draw_speed(copied).axes[0])) == len(SPEEDUPS) - 1
    (copied / COST_MODEL).unlink()
    (panel,) = draw_speed(copied).axes
    assert "*" not in "".join(label.get_text() for label in panel.get_yticklabels())
    assert [picture.name for picture in draw_all(copied, copied)] == ["speed.png"]


def test_without_results_nothing_is_drawn(tmp_path):
    assert draw_all(tmp_path, tmp_path) == []


def test_growth_shows_what_was_measured_and_the_model(copied):
    costs = json.loads((copied / COST_MODEL).read_text())
    panels = draw_growth(copied).axes[: 2 * len(AXES)]
    points = [row for row in costs["rows"] if row["axis"] == "pairs"]
    for panel, measured, model in ((panels[-2], "seconds", "on_paper"), (panels[-1], "least_gib", "gib_fitted")):
        line, markers = panel.lines
        assert list(line.get_ydata()) == [row[model] for row in points]
        assert list(markers.get_ydata()) == [row[measured] for row in points]
        assert list(markers.get_xdata()) == [1, 2, 4]
    costs["rows"] = points
    (copied / COST_MODEL).write_text(json.dumps(costs))
    (copied / SCALING[2]).unlink()
    assert len(draw_growth(copied).axes) == 2


def test_a_second_gpu_is_shown_against_the_first_of_the_same_work(copied):
    one, two = (json.loads((copied / SCALING[gpus]).read_text()) for gpus in (1, 2))
    assert set(one["settings"]) ^ set(two["settings"]) == {"GPUS=1", "GPUS=2"}
    panels = draw_growth(copied).axes
    assert len(panels) == 2 * len(AXES) + 2
    step, phases = panels[-2:]
    ratio = one["median"]["timing/seconds/step"] / two["median"]["timing/seconds/step"]
    paper, markers = step.lines
    assert dict(zip(*markers.get_data(), strict=True)) == {1: 1.0, 2: ratio}
    assert list(paper.get_xdata()) == [1, 2, 4, 8]
    assert texts(phases)[0] == f"{ratio:.2f}"
    assert len(texts(phases)) == len(SCALED)
    assert read_scaling(copied / "nowhere") == {}
