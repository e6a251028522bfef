"""The cost model: known costs are found again, and what it says on paper is ordered as work is."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
from cost_model import PHASES, CostModel, MeasuredRow, Paper, StepShape, fit_model, read_rows  # noqa: E402
from predict_8b import FILES, RESULTS, TOKENIZER, compare_steps, compute_all, describe_all, read_step  # noqa: E402
from shapes import build_config  # noqa: E402

KNOWN = CostModel(
    pair_seconds=0.125,
    attention_tflops=320.0,
    other_tflops=500.0,
    reference_tflops=520.0,
    vision_pair_seconds=0.05,
    vision_tflops=200.0,
    base_gib=18.0,
    gib_per_kilotoken=0.5,
    layer_tokens=360_000.0,
    copy_gb_per_second=3000.0,
)


@pytest.fixture(scope="module")
def paper() -> Paper:
    return Paper(KNOWN, build_config(str(TOKENIZER)), bus_gb_per_second=300.0)


def make_row(paper: Paper, shape: StepShape) -> MeasuredRow:
    """What growth_8b.py would have measured, had KNOWN been true."""
    teraflops = {name: shape.pairs * count for name, count in paper.count_pair(shape).items()}
    tokens = shape.row_tokens
    kept, memory = KNOWN.count_kept_layers(tokens, layers=36), KNOWN.least_memory_gib(tokens)
    seconds = KNOWN.seconds(teraflops, pairs=shape.pairs)
    return MeasuredRow("n", shape, shape.pairs * tokens, seconds, teraflops, kept, memory)


@pytest.fixture
def rows(paper) -> list[MeasuredRow]:
    shapes = [StepShape(n=n) for n in (2, 4, 8, 16)]
    shapes += [StepShape().change("frames", frames) for frames in (4, 24, 48)] + [StepShape(pairs=3)]
    return [make_row(paper, shape) for shape in shapes]


def test_known_costs_are_found_again(rows):
    fitted = fit_model(rows, layers=36, copy_gb_per_second=3000.0)
    for name, value in vars(KNOWN).items():
        tolerance = 0.02 if name == "layer_tokens" else 1e-6  # whole layers say it roughly
        assert getattr(fitted, name) == pytest.approx(value, rel=tolerance), name


def test_rows_that_cannot_tell_costs_apart_are_refused(rows):
    falling = [replace(row, seconds={name: 1 / row.packed_tokens for name in PHASES}) for row in rows]
    with pytest.raises(ValueError, match="have to be positive: measure more shapes"):
        fit_model(falling, layers=36, copy_gb_per_second=3000.0)
    with pytest.raises(ValueError, match="no row kept the activations of some layers only"):
        fit_model([replace(row, kept_layers=36) for row in rows], layers=36, copy_gb_per_second=3000.0)


def test_a_row_of_the_file_becomes_a_shape_with_the_middle_of_what_is_drawn_from():
    measured = {"packed_tokens": 16016, "seconds": {}, "teraflops": {}, "kept_layers": 3, "least_memory_gib": 1.0}
    rows = [{"n": 4, **measured}, {"pairs": 2, "frames": [4, 4], "prompt_tokens": 1692, **measured}]
    first, second = read_rows({"growth": {"n": rows[:1], "pairs": rows[1:]}})
    assert first.shape == StepShape(pairs=1, n=4, prompt_tokens=2400, response_tokens=600, frames=12, side=448)
    assert first.drawn_shape.response_tokens == (16016 / 2 - 2400) / 4 - 1
    assert first.drawn_shape.row_tokens == 16016
    assert (second.axis, second.shape.pairs, second.shape.frames, second.row_tokens) == ("pairs", 2, 4, 8008)


def test_operations_on_paper_are_those_that_growth_8b_counted(paper):
    """Of responses of 1,200 tokens; the prompts have 2,385 tokens rather than 2,400."""
    rows = read_rows(json.loads((RESULTS / FILES[0]).read_text()))
    row = next(row for row in rows if (row.axis, row.shape.response_tokens) == ("response_tokens", 1200))
    model = replace(KNOWN, layer_tokens=(row.kept_layers + 2.5) * row.row_tokens)
    counted = Paper(model, paper.config, bus_gb_per_second=300.0).count_pair(row.shape)
    assert counted == pytest.approx({name: row.teraflops[name] for name in counted}, rel=0.01)


def test_seconds_by_hand():
    teraflops = {"vision": 30.0, "reference": 260.0, "update": 660.0, "update_attention": 160.0}
    assert KNOWN.seconds(teraflops, pairs=2) == {"vision": 0.15, "reference": 0.5, "update": 0.25 + 0.5 + 1.0}
    assert KNOWN.seconds({**teraflops, "vision": 1.0}, pairs=2)["vision"] == 0.1
    assert KNOWN.least_memory_gib(4000) == 20.0
    assert [KNOWN.count_kept_layers(tokens, layers=36) for tokens in (1000, 20_000, 200_000)] == [36, 16, 0]


def test_rollout_by_hand(paper):
    """Weights: 36 layers of 192,937,984 and the head's 622,329,856, two bytes each; 147,456 bytes of KV a token."""
    shape = StepShape(pairs=1, n=2, prompt_tokens=1000, response_tokens=100, frames=4)
    weights = 2 * (36 * 192_937_984 + 622_329_856)
    cache = 2 * 147_456 * (100 * 1000 + 2 * 100**2 / 2)  # a prompt's once for both responses
    prefill = 2 * 36 * 192_937_984 * 1000 + 4 * 4096 * 36 * 1000**2 / 2 + 2 * 622_329_856
    video = paper.count_pair(shape)["vision"] / 200
    expected = (100 * weights + cache) / 3e12 + 2 * prefill / 500e12 + video
    assert paper.generate_seconds(shape) == pytest.approx(expected, rel=1e-9)
    longer = paper.generate_seconds(replace(shape, longest_tokens=300))
    assert longer - expected == pytest.approx(200 * weights / 3e12, rel=1e-9)


def test_more_sequences_than_fit_take_further_rounds(paper):
    """At most 256 live: 512 short ones read the weights twice as often."""
    short = StepShape(pairs=16, n=8, prompt_tokens=100, response_tokens=10, frames=4)
    whole, half = paper.generate_seconds(replace(short, pairs=32)), paper.generate_seconds(short)
    assert whole == pytest.approx(2 * half)
    assert paper.generate_seconds(replace(short, pairs=8)) > half / 2


@pytest.mark.parametrize(
    ("axis", "values"),
    [("n", (1, 2, 3, 8, 9, 64)), ("response_tokens", (10, 300, 301, 4000)), ("frames", (2, 12, 14, 200)),
     ("pairs", (1, 2, 3, 128)), ("prompt_tokens", (1300, 2400, 2500, 9000))],
)  # fmt: skip
def test_more_work_never_takes_less(paper, axis, values):
    costs = [paper.predict(StepShape(pairs=2).change(axis, value)) for value in values]
    for name in ("generate", *PHASES, "step", "row_tokens", "least_gib"):
        column = [cost[name] for cost in costs]
        assert column == sorted(column), name
    assert costs[0]["step"] < costs[-1]["step"]
    kept = [cost["kept_layers"] for cost in costs]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("bandwidth", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("pairs", [3, 8, 128])
def test_gpus_never_pay_more_than_their_number(paper, pairs, bandwidth):
    paper = Paper(KNOWN, paper.config, bus_gb_per_second=bandwidth)
    alone = paper.predict(StepShape(pairs=pairs))
    for gpus in (2, 4, 8):
        several = paper.predict(StepShape(pairs=pairs, gpus=gpus))
        for name in ("generate", *PHASES, "step"):
            assert several[name] >= alone[name] / gpus * (1 - 1e-9), (gpus, name)


def test_gathering_hides_behind_computation_unless_it_takes_longer(paper):
    """A GPU of two gets half of 13.89 GB for each of the update's three gathers."""
    shape = StepShape(pairs=2, gpus=2)
    gathered = 3 * 36 * 192_937_984 / 1e9
    slow = Paper(KNOWN, paper.config, bus_gb_per_second=1.0).predict(shape)
    assert slow["update"] == pytest.approx(gathered)
    assert slow["reference"] == pytest.approx(gathered / 3)
    assert paper.predict(shape)["update"] == paper.predict(StepShape(pairs=1))["update"]


def test_the_step_against_the_original_by_hand():
    """16 videos with prompts of 990 tokens and 8 responses of 9: 17,120 tokens packed, 128,000 with every prompt."""
    median = {"perf/packed_tokens": 16 * (990 + 8 * 10), "response_length/mean": 9.0}
    median |= {f"timing/seconds/{name}": value for name, value in
               {"generate": 5.0, "prepare": 2.0, "update": 6.0, "hand_over": 1.0, "step": 99.0}.items()}  # fmt: skip
    shape, seconds = read_step(median)
    assert (shape.pairs, shape.n, shape.prompt_tokens, shape.response_tokens) == (8, 8, 990.0, 9.0)
    update = {"original": {"tokens": 32_000, "seconds": {"old": 2.0, "reference": 1.0, "update": 8.0, "loss": 0.5}}}
    both = compare_steps(shape, seconds, update)
    assert both["tokens"] == {"ours": 17_120, "original": 128_000}
    assert both["original"] == {"generate": 5.0, "old": 8.0, "reference": 4.0, "update": 32.0}
    assert both["ours"] == {"generate": 5.0, "prepare": 2.0, "update": 6.0, "hand_over": 1.0}
    assert both["ratio"] == 49 / 14


def test_committed_numbers_are_what_the_committed_measurements_give():
    result = compute_all(RESULTS, TOKENIZER, bus_gb_per_second=329.0)
    committed = json.loads((RESULTS / "cost_model.json").read_text())
    assert result.keys() == committed.keys()
    assert result["model"] == pytest.approx(committed["model"], rel=1e-3)
    for name in ("fit", "rows", "whole_step", "on_paper"):
        for row, line in zip(result[name], committed[name], strict=True):
            assert row == pytest.approx(line, abs=1e-3), name
    assert result["against_original"]["ratio"] == pytest.approx(committed["against_original"]["ratio"], abs=1e-3)
    several = [row for row in committed["on_paper"] if row["axis"] == "gpus" and row["value"] > 1]
    assert {row["basis"] for row in several} == {"computed, not measured"}
    tables = describe_all(result)
    assert f"{result['against_original']['ratio']:.2f} times as many" in tables
    assert max(map(len, tables.splitlines())) < 160
