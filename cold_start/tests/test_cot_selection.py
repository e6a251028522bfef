"""Which CoTs are well-formed, which pair is chosen, and what stage 2's answer says: pure functions."""

import itertools
import json
import random

import pytest

from cot_support import DIMENSIONS, make_cot
from infer_utils.cot_answers import build_answer, read_opinions
from infer_utils.cot_journal import SampleKey
from infer_utils.cot_plan import Sampling
from infer_utils.cot_selection import (
    Judgement,
    Malformed,
    Rubric,
    choose_pair,
    compute_difference,
    read_judgement,
    read_rubric,
)
from scored_sequence import judge_problem

JUDGE = Rubric(DIMENSIONS, needs_overall=True)
ANY = Rubric()
GOOD = make_cot([2, 1, "N/A", 0, 2], 3.5)
SCORES = '{"dimensional_scores": {"subject": 2}, "overall_score": 3}'


def test_rubric_is_that_of_the_problems_own_example():
    assert read_rubric(judge_problem("a cat")) == JUDGE
    assert read_rubric('Rate it. <answer>{"dimensional_scores": {"look": 1}}</answer>') == Rubric(("look",), False)
    assert read_rubric("Which is better? Answer in <answer></answer>.") == ANY


@pytest.mark.parametrize("rubric", [JUDGE, ANY])
def test_well_formed_cot_is_read(rubric):
    expected = Judgement(dict(zip(DIMENSIONS, [2, 1, "N/A", 0, 2], strict=True)), 3.5)
    assert read_judgement(GOOD, rubric) == expected
    fenced = GOOD.replace("<answer>\n", "<answer>\n```json\n").replace("\n</answer>", "\n```\n</answer>")
    assert read_judgement(fenced, rubric) == expected
    assert expected.mean_score == 1 + 4 * (5 / 8)


@pytest.mark.parametrize(
    ("cot", "expected"),
    [
        ("", Malformed.EMPTY),
        (" \n", Malformed.EMPTY),
        ("It is good: 2.", Malformed.NO_ANSWER),
        (f"x <answer>{SCORES}", Malformed.NO_ANSWER),
        (f"\n<answer>{SCORES}</answer>", Malformed.NO_REASONING),
        ("x <answer>2</answer>", Malformed.NO_JSON),
        ("x <answer>{'a': 1}</answer>", Malformed.NO_JSON),
        ("x <answer>" + "[" * 100_000 + "</answer>", Malformed.NO_JSON),
        ('x <answer>{"overall_score": 3}</answer>', Malformed.NO_SCORES),
        ('x <answer>{"dimensional_scores": {}}</answer>', Malformed.NO_SCORES),
        ('x <answer>{"dimensional_scores": [2]}</answer>', Malformed.NO_SCORES),
        *[
            (f'x <answer>{{"dimensional_scores": {{"subject": {score}}}}}</answer>', Malformed.BAD_SCORE)
            for score in ("3", "-1", "2.0", "true", "null", '"2"', '"n/a"', "NaN", "[2]")
        ],
        *[
            (f'x <answer>{{"dimensional_scores": {{"subject": 2}}, "overall_score": {overall}}}</answer>', bad)
            for overall in ("0.99", "5.01", "true", "null", '"3"', "NaN", "1e999")
            for bad in [Malformed.BAD_OVERALL]
        ],
    ],
)
def test_malformed_cot_is_refused_for_its_reason(cot, expected):
    assert read_judgement(cot, ANY) == expected


def test_problem_that_shows_dimensions_and_overall_score_gets_these():
    assert read_judgement(f"x <answer>{SCORES}</answer>", JUDGE) == Malformed.OTHER_DIMENSIONS
    assert read_judgement(make_cot([2, 1, 0, 0, 2], None), JUDGE) == Malformed.BAD_OVERALL
    assert read_judgement(make_cot([2, 1, 0, 0, 2], None), ANY).overall is None


def test_difference_is_of_overall_scores_or_else_of_mean_sub_scores():
    high, low = Judgement({"x": 2}, 3.6), Judgement({"x": 1}, 3.35)
    assert compute_difference(high, low) == 0.25
    assert compute_difference(high, Judgement({"x": 1, "y": "N/A"}, None)) == 2.0  # 5 and 3
    assert compute_difference(high, Judgement({"x": "N/A"}, None)) is None


def test_documented_example_of_the_choice():
    a, b = ({n: Judgement({"x": 1}, overall) for n, overall in enumerate(of)} for of in ((3.0, 4.0), (3.5, 2.0)))
    choice = choose_pair(a, b, label="A", tie_margin=0.25)
    assert (choice.sample_a, choice.sample_b, choice.difference, choice.agrees) == (0, 1, 1.0, True)


def test_choice_equals_brute_force():
    rng = random.Random(0)
    for _ in range(500):
        sides = [{n: rng.randint(4, 20) / 4 for n in range(4) if rng.random() < 0.8} for _ in "AB"]
        label, margin = rng.choice(["A", "B", "same", "invalid"]), rng.choice([0.0, 0.25, 0.5])
        judgements = [{n: Judgement({"x": 1}, overall) for n, overall in side.items()} for side in sides]
        choice = choose_pair(*judgements, label=label, tie_margin=margin)
        pairs = sorted(itertools.product(*sides), key=lambda pair: (sum(pair), pair[0]))
        if not pairs:
            assert choice is None
            continue
        found, difference = (choice.sample_a, choice.sample_b), choice.difference
        differences = {(a, b): sides[0][a] - sides[1][b] for a, b in pairs}
        assert difference == differences[found]
        if label == "invalid":
            assert (found, choice.agrees) == (pairs[0], None)
        elif label == "same":
            nearest = min(map(abs, differences.values()))
            assert found == next(pair for pair in pairs if abs(differences[pair]) == nearest)
            assert choice.agrees == (nearest <= margin)
        else:
            gains = {pair: d if label == "A" else -d for pair, d in differences.items()}
            agreeing = [pair for pair in pairs if gains[pair] > 0]
            best = max(gains.values())
            expected = agreeing[0] if agreeing else next(pair for pair in pairs if gains[pair] == best)
            assert (found, choice.agrees) == (expected, bool(agreeing))


def test_judgements_that_cannot_be_compared_do_not_agree():
    silent = {0: Judgement({"x": "N/A"}, None)}
    choice = choose_pair(silent, {0: Judgement({"x": 2}, 4.0)}, label="B", tie_margin=0.25)
    assert (choice.difference, choice.agrees) == (None, False)


def test_opinions_become_sub_scores():
    rubric = Rubric(("look", "motion", "sound"))
    cells = {"MOS_A_look": "1", "MOS_B_look": "1.99", "MOS_A_motion": "2", "MOS_B_motion": "3.99"}
    assert read_opinions(cells, rubric) is None  # nothing about sound
    cells |= {"MOS_A_sound": "5", "MOS_B_sound": " "}
    expected = ({"look": 0, "motion": 1, "sound": 2}, {"look": 0, "motion": 1, "sound": "N/A"})
    assert read_opinions(cells, rubric) == expected
    assert read_opinions(cells, ANY) is None
    assert read_opinions(dict.fromkeys(cells, ""), rubric) is None
    for wrong in ("0", "6", "good", "nan"):
        with pytest.raises(ValueError, match=r"MOS_A_look is .* write a number from 1 to 5"):
            read_opinions(cells | {"MOS_A_look": wrong}, rubric)


def test_answer_holds_scores_where_they_are_known():
    text = build_answer("B", ({"x": 0}, {"x": "N/A"}))
    content = json.loads(text.removeprefix("<answer>").removesuffix("</answer>"))
    assert content == {"video_1_scores": {"x": 0}, "video_2_scores": {"x": "N/A"}, "gsb_result": "B"}
    assert build_answer("same", None) == '<answer>{"gsb_result": "same"}</answer>'


def test_seeds_differ_by_run_row_side_and_sample_and_fit_any_server():
    keys = [SampleKey(row, side, sample) for row in range(1, 51) for side in "AB" for sample in range(10)]
    seeds = {Sampling(4, 1.0, 1.0, 9, seed).seed_of(key) for seed in (0, 1) for key in keys}
    assert len(seeds) == 2 * len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)
