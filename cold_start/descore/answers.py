"""Annotations and judgements: the one place that reads what stands in an `answer` cell or in a model's response.

An annotation is JSON in `<answer>...</answer>` (the tags and a ``` fence are optional) or a bare label:

    <answer>{"video_1_scores": {"subject": 2, "camera": "N/A"}, "video_2_scores": {...}, "gsb_result": "A"}</answer>
    Video 2 is better

A judgement is what a response says about its own video: the first `<answer>` block, JSON with `dimensional_scores`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Side = Literal["A", "B"]

Score = int | str
NOT_ASKED = "N/A"
LABEL_KEY = "gsb_result"
SCORE_KEYS: dict[Side, str] = {"A": "video_1_scores", "B": "video_2_scores"}
JUDGEMENT_KEY = "dimensional_scores"
OVERALL_KEY = "overall_score"
LARGEST_OVERALL = 1e9
REMEDY = f"write A, B, same or invalid, or <answer> JSON with {LABEL_KEY} and the scores of both videos"

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)
_LABELS: tuple[tuple[re.Pattern, int | None], ...] = (
    (re.compile(r"(a|video a|video 1)( is better)?"), 1),
    (re.compile(r"(b|video b|video 2)( is better)?"), -1),
    (re.compile(r"(about )?(the )?same|tie|tied|equal|draw"), 0),
    (re.compile(r"(both|the two)( videos)?( are)? (about )?(the )?(same|equal|similar)"), 0),
    (re.compile(r"(both|the two)( videos)?( are)? equally (good|bad|good or bad)"), 0),
    (re.compile(r"neither( video)?( is better)?"), 0),
    (re.compile(r"invalid"), None),
)


@dataclass(frozen=True)
class Annotation:
    """What annotators said about a pair.

    `scores`: per side, dimension -> 0, 1, 2 or "N/A"; empty for a bare label. `preference`: +1 when A is better, -1
    when B is, 0 for a tie, None without a usable label.
    """

    scores: Mapping[Side, Mapping[str, Score]]
    preference: int | None


def parse_annotation(answer: str) -> Annotation:
    """Read an `answer`. Labels are read by `parse_label`; JSON without `gsb_result`, or with null, has no preference.

    Raises ValueError that says what is wrong and how to write it: no label and no JSON, scores that are not an
    object of 0, 1, 2 or "N/A", an object with neither label nor scores.
    """
    match = _ANSWER.search(answer)
    body = _strip_fence(match.group(1) if match else answer)
    content = _load_json(body)
    if isinstance(content, dict):
        return _parse_object(content)
    return Annotation(scores={"A": {}, "B": {}}, preference=parse_label(content if isinstance(content, str) else body))


def _parse_object(content: dict) -> Annotation:
    if LABEL_KEY not in content and not any(key in content for key in SCORE_KEYS.values()):
        raise ValueError(f"the answer has neither {LABEL_KEY} nor scores; {REMEDY}")
    label = content.get(LABEL_KEY)
    if not isinstance(label, str | None):
        raise ValueError(f"{LABEL_KEY} is {label!r}; {REMEDY}")
    return Annotation(
        scores={side: _check_scores(key, content.get(key, {})) for side, key in SCORE_KEYS.items()},
        preference=None if label is None else parse_label(label),
    )


def _check_scores(key: str, scores: object) -> dict[str, Score]:
    if not isinstance(scores, dict):
        raise ValueError(f'{key} is {scores!r}; write an object such as {{"subject": 2, "camera": "N/A"}}')
    for dimension, score in scores.items():
        if score != NOT_ASKED and (type(score) is not int or score not in (0, 1, 2)):
            raise ValueError(f'{key}: {dimension} is {score!r}; write 0, 1, 2 or "{NOT_ASKED}"')
    return scores


def parse_label(label: str) -> int | None:
    """+1, -1, 0 or None from a label in any of its spellings; case, outer spaces and a full stop do not matter.

    A: `A`, `Video 1`, `Video A is better`...; B alike; tie: `same`, `tie`, `equal`, `both are equal`, `both videos are
    equally good`...; None: `invalid`. Raises ValueError for anything else.
    """
    words = " ".join(label.strip().rstrip(".").lower().split())
    for pattern, preference in _LABELS:
        if pattern.fullmatch(words):
            return preference
    shown = label if len(label) <= 80 else label[:77] + "..."
    raise ValueError(f"no label in {shown!r}; {REMEDY}")


def extract_judgement(response: str) -> dict | None:
    """The JSON object of a response's first `<answer>` block if it has `dimensional_scores`, else None. Never raises.

    The values are as the model wrote them, unchecked.
    """
    match = _ANSWER.search(response)
    content = _load_json(_strip_fence(match.group(1))) if match else None
    return content if isinstance(content, dict) and JUDGEMENT_KEY in content else None


def extract_overall(response: str) -> float | None:
    """The `overall_score` that a response's judgement gives its video; None if it is no sane number. Never raises."""
    score = (extract_judgement(response) or {}).get(OVERALL_KEY)
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return float(score) if is_number and abs(score) < LARGEST_OVERALL else None


def _strip_fence(text: str) -> str:
    text = text.strip()
    fenced = _FENCED.match(text)
    return fenced.group(1) if fenced else text


def _load_json(text: str) -> object:
    """The parsed JSON, or None when it is none (null, too, is no answer)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
