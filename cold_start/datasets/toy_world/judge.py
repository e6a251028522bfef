"""What annotators write: chains of thought (CoTs) in the judge's format, with careful and careless perception.

A CoT has one line per dimension and ends with the scores as JSON:

    Subject: the clip shows a red square, the prompt asks for a red circle; the shape is wrong, so 1.
    ...
    <answer>
    {"dimensional_scores": {"subject": 1, "dynamics": 2, ...}, "overall_score": 3.50}
    </answer>

Each line says first what the clip shows, then what the prompt asks for, then the verdict, so that a model which writes
such a text has looked before it judges.
"""

import json
import re
from dataclasses import asdict, replace

import numpy as np

from .scene import (
    ATTRIBUTES,
    DIMENSIONS,
    NOT_ASKED,
    Request,
    Scene,
    Score,
    choose,
    choose_other,
    motion_phrase,
    overall_score,
    true_scores,
)

_ASKED_LINES = (
    "{name}: the clip shows {shown}, the prompt asks for {asked}; {verdict}, so {score}.",
    "{name}: I see {shown}, the prompt wants {asked}; {verdict}, score {score}.",
    "{name}: there is {shown} in the clip, the prompt says {asked}; {verdict}: {score}.",
)
_UNASKED_LINES = (
    "{name}: the clip shows {shown}, the prompt does not ask for this, so N/A.",
    "{name}: I see {shown}, the prompt does not mention it, score N/A.",
    "{name}: there is {shown} in the clip, the prompt says nothing here: N/A.",
)
_RIGHT = {
    "subject": ("color and shape are right", "both match"),
    "dynamics": ("the motion is right", "this is the motion"),
    "camera": ("the camera is right", "this matches"),
    "environment": ("place and light are right", "both match"),
    "style": ("the style is right", "this matches"),
}
_ANSWER_PATTERN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCE_PATTERN = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


def misperceive(scene: Scene, rng: np.random.Generator, rate: float) -> Scene:
    """`scene` as a hasty eye takes it in: each attribute is another one with probability `rate`, independently."""
    changes = {}
    for name, value in asdict(scene).items():
        if rng.random() < rate:
            changes[name] = choose_other(rng, ATTRIBUTES[name], value)
    return replace(scene, **changes)


def write_cot(request: Request, seen: Scene, rng: np.random.Generator) -> str:
    """A CoT whose reasoning and scores describe a clip that shows `seen`; 500 to 750 characters."""
    scores = true_scores(request, seen)
    lines = [_write_line(request, seen, name, scores[name], rng) for name in DIMENSIONS]
    overall = f'"overall_score": {overall_score(scores):.2f}'
    answer = f'{{"dimensional_scores": {json.dumps(scores)}, {overall}}}'
    return "\n".join([*lines, "<answer>", answer, "</answer>"])


def _write_line(request: Request, seen: Scene, dimension: str, score: Score, rng: np.random.Generator) -> str:
    values = {"name": dimension.capitalize(), "shown": _describe(seen, dimension), "score": score}
    if score == NOT_ASKED:
        return choose(rng, _UNASKED_LINES).format(**values)
    verdict = choose(rng, _RIGHT[dimension]) if score == 2 else _fault(request.scene, seen, dimension)
    asked = _describe(request.scene, dimension)
    return choose(rng, _ASKED_LINES).format(**values, asked=asked, verdict=verdict)


def _describe(scene: Scene, dimension: str) -> str:
    """A noun phrase for one dimension of a scene; `write_prompt` uses the same words."""
    if dimension == "subject":
        return f"a {scene.color} {scene.shape}"
    if dimension == "dynamics":
        return f"a shape that {motion_phrase(scene.motion)}"
    if dimension == "camera":
        return f"a camera that {motion_phrase(scene.camera)}"
    if dimension == "environment":
        return f"the {scene.place} by {scene.light}"
    return f"the {scene.style} style"


def _fault(asked: Scene, seen: Scene, dimension: str) -> str:
    """What is wrong in a dimension that is not fully right."""
    if dimension in ("subject", "environment"):
        first, second = ("color", "shape") if dimension == "subject" else ("place", "light")
        wrong = [name for name in (first, second) if getattr(asked, name) != getattr(seen, name)]
        return "both are wrong" if len(wrong) == 2 else f"the {wrong[0]} is wrong"
    if dimension == "style":
        return "the style is wrong"
    attribute, noun = ("motion", "it") if dimension == "dynamics" else ("camera", "the camera")
    if getattr(asked, attribute) == "still":
        return f"{noun} should not move"
    return f"{noun} should move" if getattr(seen, attribute) == "still" else f"{noun} moves another way"


def damage_json(cot: str, rng: np.random.Generator) -> str:
    """The CoT with an answer that does not parse: a missing bracket, a missing quote or a cut-off end."""
    damages = (("}, ", ", "), ('"subject"', '"subject'), ("\n</answer>", ""))
    before, after = choose(rng, damages)
    return cot.replace(before, after)


def parse_scores(text: str) -> dict[str, Score] | None:
    """`dimensional_scores` of the first <answer> block (a ```json fence is allowed), or None when it is unusable.

    Usable means: JSON, and for each dimension 0, 1, 2 or "N/A" and nothing else. Never raises.
    """
    match = _ANSWER_PATTERN.search(text)
    if match is None:
        return None
    body = match.group(1).strip()
    fenced = _FENCE_PATTERN.match(body)
    try:
        answer = json.loads(fenced.group(1) if fenced else body)
    except (ValueError, RecursionError):
        return None
    scores = answer.get("dimensional_scores") if isinstance(answer, dict) else None
    if not isinstance(scores, dict) or set(scores) != set(DIMENSIONS):
        return None
    usable = all(score == NOT_ASKED or (type(score) is int and score in (0, 1, 2)) for score in scores.values())
    return {name: scores[name] for name in DIMENSIONS} if usable else None
