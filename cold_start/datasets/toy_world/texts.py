"""Prompts, and what annotators write about clips: chains of thought (CoTs) in the judge's format.

A CoT has one line per dimension and ends with the scores as JSON. Each line says what the clip shows, then what the
prompt asks for, then the verdict: a model that writes in this order looks before it judges.

    Subject: the clip shows a red square, the prompt asks for a red circle; the shape is wrong, so 1.
"""

import json
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
    overall_score,
    true_scores,
)

_SUBJECTS = ("a {color} {shape}", "one {color} {shape}", "a single {color} {shape}")
_LEADS = ("{subject} {motion}", "There is {subject} that {motion}", "Show {subject} that {motion}")
_PLACE_CLAUSES = (" in the {place} by {light}", " by {light} in the {place}")
_PLACE_SENTENCES = ("The place is the {place} by {light}.", "It is {light} in the {place}.")
_CAMERA_SENTENCES = ("The camera {camera}.", "Camera: it {camera}.", "During the clip the camera {camera}.")
_STYLE_SENTENCES = ("The style is {style}.", "Use the {style} style.", "Style: {style}.")
_PLACE_CLAUSE_PROBABILITY = 0.6

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
_SHOWN = {
    "subject": "a {color} {shape}",
    "dynamics": "a shape that {motion}",
    "camera": "a camera that {camera}",
    "environment": "the {place} by {light}",
    "style": "the {style} style",
}
_RIGHT = {
    "subject": ("color and shape are right", "both match"),
    "dynamics": ("the motion is right", "this is the motion"),
    "camera": ("the camera is right", "this matches"),
    "environment": ("place and light are right", "both match"),
    "style": ("the style is right", "this matches"),
}
_DAMAGES = (("}, ", ", "), ('"subject"', '"subject'), ("\n</answer>", ""))  # each breaks the answer


def phrase(attribute: str, value: str) -> str:
    """A value in words: a verb phrase for motions ("moves left", "grows", "stays still"), else the value itself."""
    if attribute not in ("motion", "camera") or value in ("grows", "shrinks") or " " in value:
        return value
    return "stays still" if value == "still" else f"moves {value}"


def _phrases(scene: Scene) -> dict[str, str]:
    return {name: phrase(name, value) for name, value in asdict(scene).items()}


def write_prompt(request: Request, rng: np.random.Generator) -> str:
    """A prompt that names the mentioned dimensions: "A red circle grows in the city by day. The style is flat."."""
    phrases = _phrases(request.scene)
    subject = choose(rng, _SUBJECTS).format(**phrases)
    lead = choose(rng, _LEADS).format(subject=subject, **phrases)
    sentences = []
    if "environment" in request.mentioned:
        if rng.random() < _PLACE_CLAUSE_PROBABILITY:
            lead += choose(rng, _PLACE_CLAUSES).format(**phrases)
        else:
            sentences.append(choose(rng, _PLACE_SENTENCES).format(**phrases))
    if "camera" in request.mentioned:
        sentences.append(choose(rng, _CAMERA_SENTENCES).format(**phrases))
    if "style" in request.mentioned:
        sentences.append(choose(rng, _STYLE_SENTENCES).format(**phrases))
    order = rng.permutation(len(sentences))
    return " ".join([lead[0].upper() + lead[1:] + ".", *(sentences[i] for i in order)])


def misperceive(scene: Scene, rng: np.random.Generator, rate: float) -> Scene:
    """`scene` with errors of perception: each attribute is replaced with probability `rate`, independently."""
    changes = {}
    for name, value in asdict(scene).items():
        if rng.random() < rate:
            changes[name] = choose_other(rng, ATTRIBUTES[name], value)
    return replace(scene, **changes)


def write_cot(request: Request, seen: Scene, rng: np.random.Generator) -> str:
    """A CoT of 500 to 750 characters whose reasoning and scores describe a clip that shows `seen`."""
    scores = true_scores(request, seen)
    lines = [_write_line(request, seen, name, scores[name], rng) for name in DIMENSIONS]
    overall = f'"overall_score": {overall_score(scores):.2f}'
    answer = f'{{"dimensional_scores": {json.dumps(scores)}, {overall}}}'
    return "\n".join([*lines, "<answer>", answer, "</answer>"])


def _write_line(request: Request, seen: Scene, dimension: str, score: Score, rng: np.random.Generator) -> str:
    shown, asked = (_SHOWN[dimension].format(**_phrases(scene)) for scene in (seen, request.scene))
    values = {"name": dimension.capitalize(), "shown": shown, "asked": asked, "score": score}
    if score == NOT_ASKED:
        return choose(rng, _UNASKED_LINES).format(**values)
    verdict = choose(rng, _RIGHT[dimension]) if score == 2 else _fault(request.scene, seen, dimension)
    return choose(rng, _ASKED_LINES).format(**values, verdict=verdict)


def _fault(asked: Scene, seen: Scene, dimension: str) -> str:
    """What is wrong, for a dimension with a score below 2."""
    wrong = [name for name in DIMENSIONS[dimension] if getattr(asked, name) != getattr(seen, name)]
    if dimension not in ("dynamics", "camera"):
        return "both are wrong" if len(wrong) == 2 else f"the {wrong[0]} is wrong"
    noun = "it" if dimension == "dynamics" else "the camera"
    if getattr(asked, wrong[0]) == "still":
        return f"{noun} should not move"
    return f"{noun} should move" if getattr(seen, wrong[0]) == "still" else f"{noun} moves another way"


def damage_json(cot: str, rng: np.random.Generator) -> str:
    """The CoT with an answer that does not parse: a bracket, a quote or the end is missing."""
    return cot.replace(*choose(rng, _DAMAGES))


def parse_scores(cot: str) -> dict[str, Score] | None:
    """`dimensional_scores` of the <answer> block; None unless every dimension has 0, 1, 2 or "N/A"."""
    body, is_closed, _ = cot.partition("<answer>")[2].partition("</answer>")
    try:
        scores = json.loads(body)["dimensional_scores"] if is_closed else {}
        values = {name: scores[name] for name in DIMENSIONS}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_usable = all(value == NOT_ASKED or (type(value) is int and value in (0, 1, 2)) for value in values.values())
    return values if is_usable else None
