"""Which chains of thought (CoTs) of a pair are chosen, and stage 2's `answer`: pure functions of texts and label.

A CoT is well-formed when it reasons and then gives the judge's answer:

    Subject: the clip shows ...
    <answer>
    {"dimensional_scores": {"subject": 2, "camera": "N/A"}, "overall_score": 3.50}
    </answer>

A pair of well-formed CoTs agrees with its label when its overall scores rank the two videos as the label does. The
chosen pair is the first that agrees, which is rejection sampling: nothing favours extreme scores. Sub-scores of CoTs
that contradict the label, or that no label confirms, never become stage 2's ground truth.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
"""Decimals that count where overall scores are compared: 3.60 - 3.35 is a quarter."""
Scores = Mapping[str, Score]


class Malformed(StrEnum):
    """Why a CoT cannot be used."""

    CUT = "cut off before its end (--max_tokens)"
    EMPTY = "empty"
    RESERVED = "a reserved token in the text"
    TOO_LONG = "too long for training (--max_length)"
    NO_ANSWER = f"no <answer> with a JSON object that has {JUDGEMENT_KEY}"
    NO_REASONING = "no reasoning before <answer>"
    BAD_SCORES = 'no sub-scores, or others than 0, 1, 2 and "N/A"'
    OTHER_DIMENSIONS = "other dimensions than the problem asks for"
    BAD_OVERALL = f"no {OVERALL_KEY} from 1 to 5"


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


@dataclass(frozen=True)
class PairChoice:
    """The chosen CoTs of A and B.

    `difference`: score of A minus score of B on the scale from 1 to 5, None if they cannot be compared. `agrees`: with
    the label; None if the label says nothing.
    """

    a: Judgement
    b: Judgement
    difference: float | None
    agrees: bool | None

    @property
    def confirmed_scores(self) -> tuple[Scores, Scores] | None:
        """Sub-scores of A and B that may become ground truth: only if the CoTs agree with the label."""
        return (self.a.scores, self.b.scores) if self.agrees else None


def asked_dimensions(problem: str) -> tuple[str, ...]:
    """The dimensions of a problem's own example of an answer, as the built-in judge prompt has one; () without."""
    scores = (extract_judgement(problem) or {}).get(JUDGEMENT_KEY)
    return tuple(scores) if isinstance(scores, dict) else ()


def read_judgement(cot: str, problem: str) -> Judgement | Malformed:
    """The judgement of a CoT in the form that the problem's example has, or what is wrong with it. Never raises."""
    if not cot.strip():
        return Malformed.EMPTY
    answer = find_answer(cot, JUDGEMENT_KEY)
    if answer is None or answer.content is None or JUDGEMENT_KEY not in answer.content:
        return Malformed.NO_ANSWER
    if not cot[: answer.start].strip():
        return Malformed.NO_REASONING
    written, dimensions = answer.content[JUDGEMENT_KEY], asked_dimensions(problem)
    scores = {name: parse_score(score) for name, score in written.items()} if isinstance(written, dict) else {}
    if not scores or not all(score in SUB_SCORES for score in scores.values()):
        return Malformed.BAD_SCORES
    if dimensions and set(scores) != set(dimensions):
        return Malformed.OTHER_DIMENSIONS
    overall = answer.content.get(OVERALL_KEY)
    if OVERALL_KEY not in answer.content and OVERALL_KEY not in (extract_judgement(problem) or {}):
        return Judgement(cot, scores, None)
    is_number = isinstance(overall, int | float) and not isinstance(overall, bool)
    if not is_number or not LOWEST_OVERALL <= overall <= HIGHEST_OVERALL:
        return Malformed.BAD_OVERALL
    return Judgement(cot, scores, float(overall))


def compute_difference(judgement_a: Judgement, judgement_b: Judgement) -> float | None:
    """Score of A minus score of B: by overall scores where both have one, else by mean sub-scores."""
    values = (judgement_a.overall, judgement_b.overall)
    if None in values:
        values = (judgement_a.mean_score, judgement_b.mean_score)
    return None if None in values else round(values[0] - values[1], DIGITS)


def choose_pair(
    judged_a: Sequence[Judgement | Malformed],
    judged_b: Sequence[Judgement | Malformed],
    *,
    label: str,
    tie_margin: float,
) -> PairChoice | None:
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
    content: dict[str, object] = {}
    if scores is not None:
        content = {key: dict(of_video) for key, of_video in zip(SCORE_KEYS.values(), scores, strict=True)}
    return f"<answer>{json.dumps({**content, LABEL_KEY: label})}</answer>"


def read_opinions(cells: Mapping[str, str], problem: str) -> tuple[Scores, Scores] | None:
    """Sub-scores of A and B from the columns `MOS_A_<dimension>`, `MOS_B_<dimension>` of a row.

    None unless there are columns for every dimension that the problem asks for, and an opinion in one of them. An
    opinion below 2 is 0, below 4 is 1, else 2; an empty cell or N/A is "N/A". Raises ValueError for anything else.
    """
    columns = [[f"MOS_{side}_{name}" for name in asked_dimensions(problem)] for side in "AB"]
    if not all(name in cells for of_side in columns for name in of_side):
        return None
    scores = [{name[len("MOS_A_") :]: _read_opinion(cells[name], name) for name in of_side} for of_side in columns]
    return None if {*scores[0].values(), *scores[1].values()} <= {NOT_ASKED} else (scores[0], scores[1])


def _read_opinion(text: str, column: str) -> Score:
    if text.strip() in ("", NOT_ASKED):
        return NOT_ASKED
    try:
        opinion = float(text)
    except ValueError:
        opinion = math.nan
    if not LOWEST_OVERALL <= opinion <= HIGHEST_OVERALL:
        raise ValueError(f"{column} is {text!r}. Write a number from 1 to 5, or leave it empty.")
    return min(int(opinion // 2), HIGHEST_SCORE)
