"""Which CoTs are well-formed, which pair is chosen, what stage 2's answer says, and what a journal keeps."""

import pytest

from cot_support import DIMENSIONS, make_cot
from descore.answers import parse_annotation
from infer_utils.cot_engines import Judge, Sample, SampleKey
from infer_utils.cot_results import CotJournal
from infer_utils.cot_selection import (
    Judgement,
    Malformed,
    build_answer,
    choose_pair,
    compute_difference,
    read_judgement,
    read_opinions,
)
from scored_sequence import judge_problem

JUDGE, FREE = judge_problem("a cat"), "Rate it. Answer in <answer></answer>."
GOOD = make_cot([2, 1, "N/A", 0, 2], 3.5)
SCORES = '{"dimensional_scores": {"subject": 2}, "overall_score": 3}'
IDENTITY = {"model": "m", "sampling": {"seed": 0}}


def judgement(overall: float | None, **scores: int | str) -> Judgement:
    return Judgement("cot", scores or {"x": 1}, overall)


@pytest.mark.parametrize("problem", [JUDGE, FREE])
@pytest.mark.parametrize(
    "cot",
    [
        GOOD,
        GOOD.replace("<answer>\n", "<answer>\n```json\n").replace("\n</answer>", "\n```\n</answer>"),
        "I end with <answer>2</answer> later. " + GOOD,
        GOOD.replace("<answer>", "<answer>Here it is: "),
        GOOD.replace('"subject": 2', '"subject": "2"'),
    ],
)
def test_well_formed_cot_is_read(problem, cot):
    expected = Judgement(cot, dict(zip(DIMENSIONS, [2, 1, "N/A", 0, 2], strict=True)), 3.5)
    assert read_judgement(cot, problem) == expected
    assert expected.mean_score == 1 + 4 * (5 / 8)


@pytest.mark.parametrize(
    ("cot", "expected"),
    [
        (" \n", Malformed.EMPTY),
        ("It is good: 2.", Malformed.NO_ANSWER),
        (f"x <answer>{SCORES}", Malformed.NO_ANSWER),
        ("x <answer>" + "[" * 100_000 + "</answer>", Malformed.NO_ANSWER),
        ('x <answer>{"overall_score": 3}</answer>', Malformed.NO_ANSWER),
        (f"\n<answer>{SCORES}</answer>", Malformed.NO_REASONING),
        ('x <answer>{"dimensional_scores": {}}</answer>', Malformed.BAD_SCORES),
        ('x <answer>{"dimensional_scores": [2]}</answer>', Malformed.BAD_SCORES),
        *[
            (f'x <answer>{{"dimensional_scores": {{"subject": {score}}}}}</answer>', Malformed.BAD_SCORES)
            for score in ("3", "-1", "true", "null", '"3"', '"n/a"', "NaN", "[2]")
        ],
        *[
            (SCORES.replace("3", overall).join(["x <answer>", "</answer>"]), Malformed.BAD_OVERALL)
            for overall in ("0.99", "5.01", "true", '"3"', "NaN", "1e999")
        ],
    ],
)
def test_malformed_cot_is_refused_for_its_reason(cot, expected):
    assert read_judgement(cot, FREE) == expected


def test_problem_asks_for_what_its_own_example_has():
    assert read_judgement(f"x <answer>{SCORES}</answer>", JUDGE) == Malformed.OTHER_DIMENSIONS
    without_overall = make_cot([2, 1, 0, 0, 2], None)
    assert read_judgement(without_overall, JUDGE) == Malformed.BAD_OVERALL
    assert read_judgement(without_overall, FREE).overall is None


def test_difference_is_of_overall_scores_or_else_of_mean_sub_scores():
    assert compute_difference(judgement(3.6), judgement(3.35)) == 0.25
    assert compute_difference(judgement(3.6, x=2), judgement(None, x=1, y="N/A")) == 2.0  # 5 and 3
    assert compute_difference(judgement(3.6), judgement(None, x="N/A")) is None


@pytest.mark.parametrize(
    ("label", "overall_a", "overall_b", "chosen", "agrees"),
    [
        ("A", (3.0, 4.0), (3.5, 2.0), (0, 1), True),  # the documented example
        ("A", (5.0, 3.0), (2.0, 1.0), (0, 0), True),  # the first that agrees, not the widest margin
        ("A", (2.0, 3.0), (4.0, 3.5), (1, 1), False),  # the nearest to the label
        ("B", (3.0, 2.0), (3.0, 2.5), (1, 0), True),
        ("B", (None, 3.0), (3.0, 4.0), (1, 1), True),  # of A the first is malformed
        ("same", (3.0, 4.0), (2.0, 4.25), (1, 1), True),
        ("same", (3.0, 5.0), (2.5, 1.0), (0, 0), False),
        ("invalid", (3.0, 5.0), (None, 1.0), (0, 1), None),
        ("invalid", (None, None), (2.0, 1.0), None, None),
    ],
)
def test_first_pair_that_agrees_is_chosen_or_the_nearest(label, overall_a, overall_b, chosen, agrees):
    judged = [
        [judgement(overall, number=n) if overall else Malformed.EMPTY for n, overall in enumerate(of_side)]
        for of_side in (overall_a, overall_b)
    ]
    choice = choose_pair(*judged, label=label, tie_margin=0.25)
    found = choice and (choice.a.scores["number"], choice.b.scores["number"])
    assert (found, choice and choice.agrees) == (chosen, agrees)


def test_judgements_that_cannot_be_compared_do_not_agree():
    choice = choose_pair([judgement(None, x="N/A")], [judgement(4.0)], label="B", tie_margin=0.25)
    assert (choice.difference, choice.agrees, choice.confirmed_scores) == (None, False, None)


def test_opinions_become_sub_scores():
    problem = 'Rate. <answer>{"dimensional_scores": {"look": 1, "motion": 1, "sound": 1}}</answer>'
    cells = {"MOS_A_look": "1", "MOS_B_look": "1.99", "MOS_A_motion": "2", "MOS_B_motion": "3.99"}
    assert read_opinions(cells, problem) is None  # nothing about sound
    cells |= {"MOS_A_sound": "5", "MOS_B_sound": " "}
    expected = ({"look": 0, "motion": 1, "sound": 2}, {"look": 0, "motion": 1, "sound": "N/A"})
    assert read_opinions(cells, problem) == expected
    assert read_opinions(cells, FREE) is None
    assert read_opinions(dict.fromkeys(cells, ""), problem) is None
    for wrong in ("0", "6", "good", "nan"):
        with pytest.raises(ValueError, match=r"MOS_A_look is .* Write a number from 1 to 5"):
            read_opinions(cells | {"MOS_A_look": wrong}, problem)


def test_answer_is_one_that_stage_2_reads():
    annotation = parse_annotation(build_answer("B", ({"x": 0}, {"x": "N/A"})))
    assert (annotation.scores, annotation.preference) == ({"A": {"x": 0}, "B": {"x": "N/A"}}, -1)
    assert build_answer("same", None) == '<answer>{"gsb_result": "same"}</answer>'


def test_seeds_differ_by_run_row_side_and_sample_and_fit_any_server():
    keys = [SampleKey(row, side, sample) for row in range(1, 51) for side in "AB" for sample in range(10)]
    judges = [Judge("m", None, None, temperature=1.0, top_p=1.0, max_tokens=9, seed=seed) for seed in (0, 1)]
    seeds = {judge.seed_of(key) for judge in judges for key in keys}
    assert len(seeds) == 2 * len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)


def make_sample(number: int) -> Sample:
    text = f'line {number}\n"quoted", \u00e9\u2028 \r end'
    return Sample(SampleKey(1, "A", number), text, is_finished=number % 2 == 0, num_prompt_tokens=80 + number)


@pytest.fixture
def journal_path(tmp_path):
    with CotJournal(tmp_path / "out.samples.jsonl", IDENTITY) as journal:
        for number in range(3):
            journal.add(make_sample(number))
    return tmp_path / "out.samples.jsonl"


def test_journal_killed_at_any_byte_goes_on(journal_path):
    content = journal_path.read_bytes()
    for size in range(len(content)):
        journal_path.write_bytes(content[:size])
        with CotJournal(journal_path, IDENTITY) as journal:
            num_whole = max(content[:size].count(b"\n") - 1, 0)  # the first line is the identity
            assert [SampleKey(1, "A", number) in journal for number in range(3)] == [n < num_whole for n in range(3)]
            for number in range(num_whole, 3):
                journal.add(make_sample(number))
            assert [journal.read(SampleKey(1, "A", number)) for number in (2, 0, 1)] == list(
                map(make_sample, (2, 0, 1))
            )
        assert journal_path.read_bytes() == content


def test_journal_of_another_run_and_of_a_running_one_are_refused(journal_path):
    other = IDENTITY | {"sampling": {"seed": 1}}
    with pytest.raises(ValueError, match=r"sampling \(\{'seed': 0\} there, \{'seed': 1\} now\).*--overwrite"):
        CotJournal(journal_path, other)
    with CotJournal(journal_path, IDENTITY), pytest.raises(ValueError, match="in use by another run"):
        CotJournal(journal_path, IDENTITY)
    with CotJournal(journal_path, other, overwrite=True) as journal:
        assert SampleKey(1, "A", 0) not in journal


@pytest.mark.parametrize("content", [b"videos,GSB\n", b"my notes", b"[1]\n", b'{"identity": 1}\n'])
def test_a_file_that_is_not_a_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "out.samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a journal of samples"):
        CotJournal(path, IDENTITY)
    assert path.read_bytes() == content
