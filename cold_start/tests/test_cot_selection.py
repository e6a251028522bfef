"""Which CoTs are well-formed, which pair is chosen, what stage 2's answer says, and what a journal keeps."""

import pytest

from collect.endpoint import Sample, SampleKey
from collect.results import CotJournal
from collect.selection import Judgement, choose_pair, read_judgement, read_opinions
from cot_support import DIMENSIONS, make_cot
from scored_sequence import judge_problem

JUDGE, FREE = judge_problem("a cat"), "Rate it. Answer in <answer></answer>."
GOOD = make_cot([2, 1, "N/A", 0, 2], 3.5)
SCORES = '{"dimensional_scores": {"subject": 2}, "overall_score": 3}'
NO_ANSWER, BAD_SCORES, BAD_OVERALL = "no <answer>", "no sub-scores", "no overall_score from 1 to 5"
IDENTITY = {"model": "m", "sampling": {"seed": 0}}


def judgement(overall: float | None, **scores: int | str) -> Judgement:
    return Judgement("cot", scores or {"x": 1}, overall)


@pytest.mark.parametrize(
    "cot",
    [
        GOOD,
        GOOD.replace("<answer>\n", "<answer>\n```json\n").replace("\n</answer>", "\n```\n</answer>"),
        "I end with <answer>2</answer> later. " + GOOD,
        GOOD.replace('"subject": 2', '"subject": "2"'),
    ],
)
def test_well_formed_cot_is_read(cot):
    expected = Judgement(cot, dict(zip(DIMENSIONS, [2, 1, "N/A", 0, 2], strict=True)), 3.5)
    assert read_judgement(cot, JUDGE) == read_judgement(cot, FREE) == expected
    assert expected.mean_score == 1 + 4 * (5 / 8)


@pytest.mark.parametrize(
    ("cot", "expected", "problem"),
    [
        (" \n", "empty", FREE),
        ("It is good: 2.", NO_ANSWER, FREE),
        (f"x <answer>{SCORES}", NO_ANSWER, FREE),
        ('x <answer>{"overall_score": 3}</answer>', NO_ANSWER, FREE),
        (f"\n<answer>{SCORES}</answer>", "no reasoning", FREE),
        ('x <answer>{"dimensional_scores": {}}</answer>', BAD_SCORES, FREE),
        ('x <answer>{"dimensional_scores": {"subject": 3}}</answer>', BAD_SCORES, FREE),
        ('x <answer>{"dimensional_scores": {"subject": true}}</answer>', BAD_SCORES, FREE),
        (f"x <answer>{SCORES.replace('3', '5.01')}</answer>", BAD_OVERALL, FREE),
        (f"x <answer>{SCORES.replace('3', 'NaN')}</answer>", BAD_OVERALL, FREE),
        (f"x <answer>{SCORES}</answer>", "other dimensions than the problem asks for", JUDGE),
        (make_cot([2, 1, 0, 0, 2], None), BAD_OVERALL, JUDGE),
    ],
)
def test_malformed_cot_is_refused_for_its_reason(cot, expected, problem):
    assert read_judgement(cot, problem).startswith(expected)


@pytest.mark.parametrize(
    ("label", "overall_a", "overall_b", "chosen", "agrees"),
    [
        ("A", (3.0, 4.0), (3.5, 2.0), (0, 1), True),  # the documented example
        ("A", (5.0, 3.0), (2.0, 1.0), (0, 0), True),  # the first that agrees, not the widest margin
        ("A", (2.0, 3.0), (4.0, 3.5), (1, 1), False),  # the nearest to the label
        ("B", (None, 3.0), (3.0, 4.0), (1, 1), True),  # of A the first is malformed
        ("same", (3.0, 4.0), (2.0, 4.25), (1, 1), True),
        ("same", (3.0, 5.0), (2.5, 1.0), (0, 0), False),
        ("invalid", (3.0, 5.0), (None, 1.0), (0, 1), None),
        ("invalid", (None, None), (2.0, 1.0), None, None),
    ],
)
def test_first_pair_that_agrees_is_chosen_or_the_nearest(label, overall_a, overall_b, chosen, agrees):
    judged = [
        [judgement(overall, number=n) if overall else "empty" for n, overall in enumerate(of_side)]
        for of_side in (overall_a, overall_b)
    ]
    choice = choose_pair(*judged, label=label, tie_margin=0.25)
    found = choice and (choice.a.scores["number"], choice.b.scores["number"])
    assert (found, choice and choice.agrees) == (chosen, agrees)


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


SAMPLES = [
    Sample(SampleKey(1, "A", number), f'{number}\n"quoted", \u00e9\u2028 \r end', number == 1, 80 + number)
    for number in range(3)
]


@pytest.fixture
def journal_path(tmp_path):
    with CotJournal(tmp_path / "out.samples.jsonl", IDENTITY) as journal:
        for sample in SAMPLES:
            journal.add(sample)
    return tmp_path / "out.samples.jsonl"


def test_journal_killed_at_any_byte_resumes(journal_path):
    content = journal_path.read_bytes()
    for size in range(0, len(content), 3):
        journal_path.write_bytes(content[:size])
        with CotJournal(journal_path, IDENTITY) as journal:
            num_whole = max(content[:size].count(b"\n") - 1, 0)  # the first line is the identity
            assert list(journal.samples.values()) == SAMPLES[:num_whole]
            for sample in SAMPLES[num_whole:]:
                journal.add(sample)
        assert journal_path.read_bytes() == content


def test_journal_of_a_running_run_is_refused(journal_path):
    with CotJournal(journal_path, IDENTITY), pytest.raises(ValueError, match="in use by another run"):
        CotJournal(journal_path, IDENTITY)


@pytest.mark.parametrize("content", [b"my notes", b'{"identity": 1}\n'])
def test_a_file_that_is_not_a_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "out.samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a journal of samples"):
        CotJournal(path, IDENTITY)
    assert path.read_bytes() == content
