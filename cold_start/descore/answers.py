"""Labels, annotations and judgements: the one parser of `answer` cells and of a model's responses.

An annotation is a JSON object, in `<answer>...</answer>` or alone, or a bare label:

    <answer>{"video_1_scores": {"subject": 2, "camera": "N/A"}, "video_2_scores": {...}, "gsb_result": "A"}</answer>
    Video 2 is better

A judgement is what a response says about its own video: an `<answer>` block with a JSON object that has
`dimensional_scores`. A block may hold a ``` fence and text around its object. Reading takes time linear in the text.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Score = int | float | str
NOT_ASKED = "N/A"
LABEL_KEY = "gsb_result"
SCORE_KEYS = {"A": "video_1_scores", "B": "video_2_scores"}
JUDGEMENT_KEY, OVERALL_KEY = "dimensional_scores", "overall_score"
LARGEST_OVERALL = 1e9
SUB_SCORES = (0, 1, 2, NOT_ASKED)

_OPEN, _CLOSE, _FENCE = "<answer>", "</answer>", "```"
_LABELS: tuple[tuple[re.Pattern, int | None], ...] = (
    (re.compile(r"(a|video a|video 1)( is better)?"), 1),
    (re.compile(r"(b|video b|video 2)( is better)?"), -1),
    (re.compile(r"(about )?(the )?same|tie|tied|equal|draw"), 0),
    (re.compile(r"(both|the two)( videos)?( are)? (about )?(the )?(same|equal|similar)"), 0),
    (re.compile(r"(both|the two)( videos)?( are)? equally (good|bad|good or bad)"), 0),
    (re.compile(r"neither( video)?( is better)?"), 0),
    (re.compile(r"invalid"), None),
)
_OBJECT_START = re.compile(r'\{(?=\s*+["}])')
_TOKEN = re.compile(  # possessive throughout: it never backtracks
    r'\s*+(?:(?P<open>\{(?=\s*+["}])|\[)|(?P<close>[}\]])|"(?:[^"\\\x00-\x1f]++|\\.)*+"|[,:]'
    r"|true|false|null|NaN|-?Infinity|-?[0-9][0-9.eE+-]*+)"
)
_REPR = reprlib.Repr()
_REPR.maxstring = 80


@dataclass(frozen=True)
class Answer:
    """An `<answer>` block: the index of its tag in the text, its body, and the JSON object in it (None: no object)."""

    start: int
    body: str
    content: dict | None


@dataclass(frozen=True)
class Annotation:
    """What annotators said about a pair.

    `scores`: per side (A, B), dimension -> 0, 1, 2 or "N/A"; empty for a bare label. `preference`: +1 when A is
    better, -1 when B is, 0 for a tie, None without a usable label.
    """

    scores: Mapping[str, Mapping[str, Score]]
    preference: int | None


def parse_label(text: str) -> int | None:
    """+1, -1, 0 or None from a label in any spelling; case, outer spaces, quotes and full stops do not matter.

    A: `A`, `Video 1`, `Video A is better`...; B alike; tie: `same`, `tie`, `equal`, `both are equal`, `both videos are
    equally good`...; None: `invalid`. Raises ValueError for anything else.
    """
    words = " ".join(text.lower().split()).strip("\"'`. ")
    for pattern, preference in _LABELS:
        if pattern.fullmatch(words):
            return preference
    raise ValueError(f"{_REPR.repr(text)} is not a label. Write A, B, same or invalid.")


def parse_score(value: object) -> Score | None:
    """A sub-score as a number, or "N/A"; None for anything else. "2" and 2.0 are 2; True is not a score."""
    if value == NOT_ASKED:
        return NOT_ASKED
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def find_answer(text: str, *keys: str) -> Answer | None:
    """The last `<answer>` block whose JSON object has one of `keys`, else the last block; None without a block.

    A block ends at `</answer>` and begins at the nearest `<answer>` before. Of its objects the first in a ``` fence
    counts, else the first.
    """
    last = None
    for start, body in _iterate_blocks(text):
        answer = Answer(start, body, _find_object(body))
        if answer.content is not None and any(key in answer.content for key in keys):
            return answer
        last = last or answer
    return last


def extract_judgement(response: str) -> dict | None:
    """The JSON object of the last `<answer>` block with `dimensional_scores`, as it was written; None without one."""
    answer = find_answer(response, JUDGEMENT_KEY)
    return answer.content if answer and answer.content and JUDGEMENT_KEY in answer.content else None


def extract_overall(response: str) -> float | None:
    """The `overall_score` that a response's judgement gives its video; None if it is not a sane number."""
    score = (extract_judgement(response) or {}).get(OVERALL_KEY)
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return float(score) if is_number and abs(score) < LARGEST_OVERALL else None


def parse_annotation(text: str) -> Annotation:
    """Read an `answer` cell. JSON without `gsb_result`, or with null, has no preference.

    Raises ValueError, with the remedy, for text without JSON and label, scores that are not an object of 0, 1, 2
    (numbers or strings of them) or "N/A", and an object with neither label nor scores.
    """
    answer = find_answer(text, LABEL_KEY, *SCORE_KEYS.values()) or Answer(0, text, _find_object(text))
    content = answer.content
    if content is None:
        return Annotation(scores={"A": {}, "B": {}}, preference=parse_label(answer.body))
    if LABEL_KEY not in content and not any(key in content for key in SCORE_KEYS.values()):
        raise ValueError(f"the answer has neither {LABEL_KEY} nor scores. Write at least {LABEL_KEY}.")
    label = content.get(LABEL_KEY)
    if not isinstance(label, str | None):
        raise ValueError(f"{LABEL_KEY} is {_REPR.repr(label)}. Write A, B, same or invalid.")
    return Annotation(
        scores={side: _parse_scores(key, content.get(key, {})) for side, key in SCORE_KEYS.items()},
        preference=None if label is None else parse_label(label),
    )


def _parse_scores(key: str, scores: object) -> dict[str, Score]:
    if not isinstance(scores, dict):
        raise ValueError(f'{key} is {_REPR.repr(scores)}. Write an object such as {{"subject": 2, "camera": "N/A"}}.')
    for dimension, score in scores.items():
        if parse_score(score) not in SUB_SCORES:
            raise ValueError(f'{key}: {dimension} is {_REPR.repr(score)}. Write 0, 1, 2 or "{NOT_ASKED}".')
    return {dimension: parse_score(score) for dimension, score in scores.items()}


def _iterate_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Start and body of each `<answer>` block, the last first."""
    end = text.rfind(_CLOSE)
    while end >= 0:
        previous = text.rfind(_CLOSE, 0, end)
        start = text.rfind(_OPEN, max(previous, 0), end)
        if start >= 0:
            yield start, text[start + len(_OPEN) : end]
        end = previous


def _find_object(body: str) -> dict | None:
    """The first JSON object in a closed ``` fence, else the first in the whole text."""
    for text in (*body.split(_FENCE)[1:-1:2], body):
        found = _find_first_object(text)
        if found is not None:
            return found
    return None


def _find_first_object(text: str) -> dict | None:
    """The first JSON object. Braces that open none are skipped."""
    start = _OBJECT_START.search(text)
    while start:
        end, is_closed = _skip_value(text, start.start())
        if is_closed:
            try:
                return json.loads(text[start.start() : end])
            except (ValueError, RecursionError):  # a missing comma, or nesting or a number without end
                pass
        start = _OBJECT_START.search(text, end)
    return None


def _skip_value(text: str, position: int) -> tuple[int, bool]:
    """The end of the balanced value at `position`, or where the tokens of JSON end before it is closed (False)."""
    depth = 0
    while token := _TOKEN.match(text, position):
        position = token.end()
        depth += {"open": 1, "close": -1, None: 0}[token.lastgroup]
        if depth == 0:
            return position, True
    return position, False
