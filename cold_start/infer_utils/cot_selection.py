"""Which of the chains of thought (CoTs) sampled for a pair are kept: pure functions of texts, scores and label.

A CoT is well-formed when it reasons and then gives the judge's answer:

    Subject: the clip shows ...
    <answer>
    {"dimensional_scores": {"subject": 2, "camera": "N/A"}, "overall_score": 3.50}
    </answer>

Of the well-formed ones, a pair of CoTs agrees with its label when its overall scores rank the two videos as the label
does. The chosen pair of samples is the first that agrees, which is rejection sampling: nothing favours extreme scores.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from preference_csv import INVALID_LABEL, PREFERENCES

Score = int | str
NOT_ASKED = "N/A"
SCORES_KEY, OVERALL_KEY = "dimensional_scores", "overall_score"
LOWEST_OVERALL, HIGHEST_OVERALL, HIGHEST_SCORE = 1.0, 5.0, 2
DIGITS = 6
"""Decimals that count where overall scores are compared: 3.60 - 3.35 is a quarter."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)


class Malformed(StrEnum):
    """Why a CoT cannot be used."""

    CUT = "cut off before its end (--max_tokens)"
    EMPTY = "empty"
    RESERVED = "a reserved token in the text"
    TOO_LONG = "too long for training (--max_length)"
    NO_ANSWER = "no <answer>...</answer>"
    NO_REASONING = "no reasoning before <answer>"
    NO_JSON = "the answer is no JSON object"
    NO_SCORES = f"no {SCORES_KEY}"
    BAD_SCORE = 'a score other than 0, 1, 2 or "N/A"'
    OTHER_DIMENSIONS = "other dimensions than the problem asks for"
    BAD_OVERALL = f"no {OVERALL_KEY} from 1 to 5"


@dataclass(frozen=True)
class Rubric:
    """What a problem asks of an answer, by its own example: dimensions (None: any), and whether an overall score."""

    dimensions: tuple[str, ...] | None = None
    needs_overall: bool = False


@dataclass(frozen=True)
class Judgement:
    """What a well-formed CoT says of its video.

    `scores`: dimension -> 0, 1, 2 or "N/A". `overall`: 1 to 5, None where the CoT gives none.
    """

    scores: Mapping[str, Score]
    overall: float | None

    @property
    def mean_score(self) -> float | None:
        """The mean of the sub-scores that are not "N/A", on the scale of overall scores (0 is 1, 2 is 5)."""
        counted = [score for score in self.scores.values() if score != NOT_ASKED]
        if not counted:
            return None
        share = sum(counted) / (HIGHEST_SCORE * len(counted))
        return LOWEST_OVERALL + (HIGHEST_OVERALL - LOWEST_OVERALL) * share


@dataclass(frozen=True)
class PairChoice:
    """The samples that are kept, by their numbers.

    `difference`: score of A minus score of B in points of the scale from 1 to 5, None where they cannot be compared.
    `agrees`: with the label; None where the label says nothing.
    """

    sample_a: int
    sample_b: int
    difference: float | None
    agrees: bool | None


def read_rubric(problem: str) -> Rubric:
    """The rubric in a problem that shows its own `<answer>` example, as the built-in judge prompt does."""
    answer = _parse_answer(problem)
    scores = answer.get(SCORES_KEY) if isinstance(answer, dict) else None
    if not isinstance(scores, dict) or not scores:
        return Rubric()
    return Rubric(dimensions=tuple(scores), needs_overall=OVERALL_KEY in answer)


def read_judgement(cot: str, rubric: Rubric) -> Judgement | Malformed:
    """The judgement of a CoT, or what is wrong with its form. Never raises. The first `<answer>` block counts."""
    if not cot.strip():
        return Malformed.EMPTY
    match = _ANSWER.search(cot)
    if match is None:
        return Malformed.NO_ANSWER
    if not cot[: match.start()].strip():
        return Malformed.NO_REASONING
    answer = _parse_answer(cot)
    if not isinstance(answer, dict):
        return Malformed.NO_JSON
    return _read_scores(answer, rubric)


def _read_scores(answer: dict, rubric: Rubric) -> Judgement | Malformed:
    scores, overall = answer.get(SCORES_KEY), answer.get(OVERALL_KEY)
    if not isinstance(scores, dict) or not scores:
        return Malformed.NO_SCORES
    if not all(is_score(score) for score in scores.values()):
        return Malformed.BAD_SCORE
    if rubric.dimensions is not None and set(scores) != set(rubric.dimensions):
        return Malformed.OTHER_DIMENSIONS
    if OVERALL_KEY in answer or rubric.needs_overall:
        is_number = isinstance(overall, int | float) and not isinstance(overall, bool)
        if not is_number or not LOWEST_OVERALL <= overall <= HIGHEST_OVERALL:
            return Malformed.BAD_OVERALL
        overall = float(overall)
    return Judgement(scores=scores, overall=overall)


def is_score(value: object) -> bool:
    """Whether a value is a sub-score as stage 2 reads them: the integer 0, 1 or 2 (not True), or "N/A"."""
    return value == NOT_ASKED or (type(value) is int and 0 <= value <= HIGHEST_SCORE)


def _parse_answer(text: str) -> object:
    """The JSON of the first `<answer>` block, with or without a fence; None when there is none."""
    match = _ANSWER.search(text)
    if match is None:
        return None
    body = match.group(1).strip()
    fenced = _FENCED.match(body)
    try:
        return json.loads(fenced.group(1) if fenced else body)
    except (ValueError, RecursionError):
        return None


def compute_difference(judgement_a: Judgement, judgement_b: Judgement) -> float | None:
    """Score of A minus score of B: by overall scores where both have one, else by mean sub-scores."""
    values = (judgement_a.overall, judgement_b.overall)
    if None in values:
        values = (judgement_a.mean_score, judgement_b.mean_score)
    return None if None in values else round(values[0] - values[1], DIGITS)


def choose_pair(
    judgements_a: Mapping[int, Judgement], judgements_b: Mapping[int, Judgement], *, label: str, tie_margin: float
) -> PairChoice | None:
    """The pair of well-formed samples, (number -> judgement) of either side, that is kept; None when a side has none.

    `label`: `A` and `B` agree with a higher score of that side, `same` with scores that differ by at most
    `tie_margin`; under `invalid` only form counts. Among pairs that agree with `A` or `B`, and under `invalid`, the
    first in order of (a + b, a) is taken; under `same`, and when none agrees, first the one nearest to the label.

    Example: label A, overall scores 3.0, 4.0 of A and 3.5, 2.0 of B: pairs (0, 1), (1, 0) and (1, 1) agree; (0, 1) is
    taken.
    """
    ranked = []
    for a, judgement_a in judgements_a.items():
        for b, judgement_b in judgements_b.items():
            difference = compute_difference(judgement_a, judgement_b)
            agrees, distance = _compare(difference, label, tie_margin)
            choice = PairChoice(sample_a=a, sample_b=b, difference=difference, agrees=agrees)
            ranked.append(((agrees is False, distance, a + b, a), choice))
    return min(ranked, key=lambda entry: entry[0])[1] if ranked else None


def _compare(difference: float | None, label: str, tie_margin: float) -> tuple[bool | None, float]:
    """Whether a difference agrees with a label, and how far it is from the nearest that does (0 for A, B: enough)."""
    if label == INVALID_LABEL:
        return None, 0.0
    if difference is None:
        return False, math.inf
    sign = PREFERENCES[label]
    if sign == 0:
        return abs(difference) <= tie_margin, abs(difference)
    return sign * difference > 0, max(-sign * difference, 0.0)
