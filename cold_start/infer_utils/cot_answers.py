"""Stage 2's `answer` of a pair: its label, and the sub-scores of both videos where they are known.

    <answer>{"video_1_scores": {"subject": 2}, "video_2_scores": {"subject": 0}, "gsb_result": "A"}</answer>

Sub-scores come from annotators' columns `MOS_A_<dimension>`, `MOS_B_<dimension>`, else from a pair of chains of
thought (CoTs) that agrees with the label: scores that contradict it, or that no label confirms, are not made truth.
"""

import json
import math
from collections.abc import Mapping
from enum import StrEnum

from infer_utils.cot_selection import NOT_ASKED, Rubric, Score

Scores = Mapping[str, Score]
LOWEST_OPINION, HIGHEST_OPINION = 1.0, 5.0


class AnswerSource(StrEnum):
    """Where an answer comes from."""

    KEPT = "answers that were there"
    OPINIONS = "label and MOS columns"
    COTS = "label and CoTs that agree with it"
    LABEL = "label only"


def build_answer(label: str, scores: tuple[Scores, Scores] | None) -> str:
    """The `answer` cell. `scores`: of A and B; None writes the label alone, which has nothing to compare with."""
    content: dict[str, object] = {}
    if scores is not None:
        content = {f"video_{number}_scores": dict(of_video) for number, of_video in enumerate(scores, start=1)}
    return f"<answer>{json.dumps({**content, 'gsb_result': label})}</answer>"


def opinion_columns(rubric: Rubric) -> dict[str, tuple[str, str]]:
    """Dimension -> its MOS columns of A and B, for the dimensions that a problem asks for."""
    return {name: (f"MOS_A_{name}", f"MOS_B_{name}") for name in rubric.dimensions or ()}


def read_opinions(cells: Mapping[str, str], rubric: Rubric) -> tuple[Scores, Scores] | None:
    """Sub-scores of A and B by the MOS columns of a row.

    None unless the row has the columns of every dimension that the problem asks for, and an opinion in one of them.
    An opinion below 2 is 0, below 4 is 1, else 2; an empty cell or N/A is "N/A". Raises ValueError for anything else.
    """
    columns = opinion_columns(rubric)
    if not columns or any(name not in cells for pair in columns.values() for name in pair):
        return None
    sides = [{name: _read_opinion(cells, pair[side]) for name, pair in columns.items()} for side in (0, 1)]
    if all(score == NOT_ASKED for scores in sides for score in scores.values()):
        return None
    return sides[0], sides[1]


def _read_opinion(cells: Mapping[str, str], column: str) -> Score:
    text = cells[column].strip()
    if text in ("", NOT_ASKED):
        return NOT_ASKED
    try:
        opinion = float(text)
    except ValueError:
        opinion = math.nan
    if not LOWEST_OPINION <= opinion <= HIGHEST_OPINION:
        raise ValueError(f"{column} is {text!r}; write a number from 1 to 5, or leave it empty")
    return min(int(opinion // 2), 2)
