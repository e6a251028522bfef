"""The choice of chains of thought (CoTs) for a pair, and stage 2's `answer`: pure functions of texts and label.

A CoT is well-formed when it reasons and then gives the judge's answer:

    Subject: the clip shows ...
    <answer>
    {"dimensional_scores": {"subject": 2, "camera": "N/A"}, "overall_score": 3.50}
    </answer>

A pair of well-formed CoTs agrees with its label if its overall scores rank the two videos as the label does. The first
pair that agrees is chosen. This is rejection sampling: nothing favors extreme scores. Sub-scores of CoTs that
contradict the label, or that no label confirms, never become stage 2's ground truth.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from descore.answers import (
    JUDGEMENT_KEY,
    LABEL_KEY,
    NOT_ASKED,
    OVERALL_KEY,
    SCORE_KEYS,
    SUB_SCORES,
    Score,
    extract_judgement,
    find_answer,
    parse_label,
    parse_score,
)

LOWEST_OVERALL, HIGHEST_OVERALL, HIGHEST_SCORE = 1.0, 5.0, 2
DIGITS = 6
"""Decimals in comparisons of overall scores: 3.60 - 3.35 must be 0.25."""
Scores = Mapping[str, Score]


@dataclass(frozen=True)
class Judgement:
    """A well-formed CoT and what it says of its video: dimension -> 0, 1, 2 or "N/A"; `overall` 1 to 5 or None."""

    cot: str
    scores: Scores
    overall: float | None

    @property
    def mean_score(self) -> float | None:
        """The mean of the sub-scores that are not "N/A", on the scale of overall scores (0 is 1, 2 is 5)."""
        counted = [score for score in self.scores.values() if score != NOT_ASKED]
        if not counted:
            return None
        share = sum(counted) / (HIGHEST_SCORE * len(counted))
        return LOWEST_OVERALL + (HIGHEST_OVERALL - LOWEST_OVERALL) * share


Judged = Sequence[Judgement | str]
"""What each sample of a video says; for a malformed one, what is wrong with it."""


class PairChoice(NamedTuple):
    """The chosen CoTs of A and B.

    `difference`: score of A minus score of B on the scale from 1 to 5, None if they cannot be compared. `agrees`: with
    the label; None if the label says nothing.
    """

    a: Judgement
    b: Judgement
    difference: float | None
    agrees: bool | None


def asked_dimensions(problem: str) -> tuple[str, ...]:
    """The dimensions of a problem's own example of an answer, as the built-in judge prompt has one; () without."""
    scores = (extract_judgement(problem) or {}).get(JUDGEMENT_KEY)
    return tuple(scores) if isinstance(scores, dict) else ()


def read_judgement(cot: str, problem: str) -> Judgement | str:
    """The judgement of a CoT in the form that the problem's example has, or what is wrong with it. Never raises."""
    if not cot.strip():
        return "empty"
    answer = find_answer(cot, JUDGEMENT_KEY)
    if answer is None or answer.content is None or JUDGEMENT_KEY not in answer.content:
        return f"no <answer> with a JSON object that has {JUDGEMENT_KEY}"
    if not cot[: answer.start].strip():
        return "no reasoning before <answer>"
    return _read_scores(cot, answer.content, problem)


def _read_scores(cot: str, content: dict, problem: str) -> Judgement | str:
    written, dimensions = content[JUDGEMENT_KEY], asked_dimensions(problem)
    scores = {name: parse_score(score) for name, score in written.items()} if isinstance(written, dict) else {}
    if not scores or not all(score in SUB_SCORES for score in scores.values()):
        return 'no sub-scores, or others than 0, 1, 2 and "N/A"'
    if dimensions and set(scores) != set(dimensions):
        return "other dimensions than the problem asks for"
    overall = content.get(OVERALL_KEY)
    if OVERALL_KEY not in content and OVERALL_KEY not in (extract_judgement(problem) or {}):
        return Judgement(cot, scores, None)
    is_number = isinstance(overall, int | float) and not isinstance(overall, bool)
    if not is_number or not LOWEST_OVERALL <= overall <= HIGHEST_OVERALL:
        return f"no {OVERALL_KEY} from 1 to 5"
    return Judgement(cot, scores, float(overall))


def compute_difference(judgement_a: Judgement, judgement_b: Judgement) -> float | None:
    """Score of A minus score of B: by overall scores where both have one, else by mean sub-scores."""
    values = (judgement_a.overall, judgement_b.overall)
    if None in values:
        values = (judgement_a.mean_score, judgement_b.mean_score)
    return None if None in values else round(values[0] - values[1], DIGITS)


def choose_pair(judged_a: Judged, judged_b: Judged, *, label: str, tie_margin: float) -> PairChoice | None:
    """The chosen pair among the samples of A and B; None if a side has no well-formed one.

    `label`: `A` and `B` agree with a higher score of that side, `same` with scores that differ by at most
    `tie_margin`; under `invalid` only form counts. Among pairs (a, b) that agree with `A` or `B`, and under `invalid`,
    the first in order of numbers (a + b, a) is taken; under `same`, and when none agrees, the nearest to the label.

    Example: label A, overall scores 3.0, 4.0 of A and 3.5, 2.0 of B: pairs (0, 1), (1, 0) and (1, 1) agree; (0, 1) is
    taken.
    """
    preference, ranked = parse_label(label), []
    for (a, judgement_a), (b, judgement_b) in itertools.product(enumerate(judged_a), enumerate(judged_b)):
        if isinstance(judgement_a, Judgement) and isinstance(judgement_b, Judgement):
            difference = compute_difference(judgement_a, judgement_b)
            agrees, distance = _compare(difference, preference, tie_margin)
            choice = PairChoice(judgement_a, judgement_b, difference, agrees)
            ranked.append(((agrees is False, distance, a + b, a), choice))
    return min(ranked, key=lambda entry: entry[0])[1] if ranked else None


def _compare(difference: float | None, preference: int | None, tie_margin: float) -> tuple[bool | None, float]:
    """Whether a difference agrees with a preference (+1, 0, -1, None: invalid), and how far it is from agreeing."""
    if preference is None:
        return None, 0.0
    if difference is None:
        return False, math.inf
    if preference == 0:
        return abs(difference) <= tie_margin, abs(difference)
    return preference * difference > 0, max(-preference * difference, 0.0)


def build_answer(label: str, scores: tuple[Scores, Scores] | None) -> str:
    """Stage 2's `answer` cell. `scores`: sub-scores of A and B; with None the label stands alone."""
    by_key = dict(zip(SCORE_KEYS.values(), scores, strict=True)) if scores else {}
    return f"<answer>{json.dumps({**by_key, LABEL_KEY: label})}</answer>"


def read_opinions(cells: Mapping[str, str], problem: str) -> tuple[Scores, Scores] | None:
    """Sub-scores of A and B from the columns `MOS_A_<dimension>`, `MOS_B_<dimension>` of a row.

    None unless there are columns for every dimension that the problem asks for, and an opinion in one of them. An
    opinion below 2 is 0, below 4 is 1, else 2; an empty cell or N/A is "N/A". Raises ValueError for anything else.
    """
    names = asked_dimensions(problem)
    if not all(f"MOS_{side}_{name}" in cells for side in "AB" for name in names):
        return None
    scores_a, scores_b = ({name: _read_opinion(cells, f"MOS_{side}_{name}") for name in names} for side in "AB")
    return None if {*scores_a.values(), *scores_b.values()} <= {NOT_ASKED} else (scores_a, scores_b)


def _read_opinion(cells: Mapping[str, str], column: str) -> Score:
    text = cells[column].strip()
    if text in ("", NOT_ASKED):
        return NOT_ASKED
    try:
        opinion = float(text)
    except ValueError:
        opinion = math.nan
    if not LOWEST_OVERALL <= opinion <= HIGHEST_OVERALL:
        raise ValueError(f"{column} is {cells[column]!r}. Write a number from 1 to 5, or leave it empty.")
    return min(int(opinion // 2), HIGHEST_SCORE)
