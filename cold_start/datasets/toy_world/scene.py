"""Scenes, requests, and the rules by which a clip is scored.

A scene is what a clip shows; a request is a scene together with the dimensions that the prompt mentions.

Sub-scores (`true_scores`), "N/A" for a dimension that the prompt does not mention:
    subject, environment  2 both attributes as asked, 1 one of them, 0 neither
    dynamics, camera      2 as asked, 1 moves but in another way, 0 still when asked to move, or the reverse
    style                 2 as asked, 0 otherwise
The clip of higher utility (the sum of UTILITY_WEIGHTS * score) is preferred; equal utilities are a tie.

A clip is wrong in 0 to 3 of the mentioned dimensions, with the probabilities of its generator (GENERATORS). The
dimensions that are not mentioned are random.

Held-out scenes: colors and shapes fall into three groups by index modulo 3. Triples of a color and a shape of the same
group and one of the group's four HELD_OUT_MOTIONS are held out (48 of 252 triples). Every value and every pair of
values still occurs in training.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Score = int | Literal["N/A"]

ATTRIBUTES = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
    "color": ("red", "green", "blue", "yellow", "purple", "white"),
    "motion": ("left", "right", "up", "down", "grows", "shrinks", "still"),
    "camera": ("still", "pans left", "pans right", "zooms in"),
    "place": ("desert", "ocean", "forest", "city", "garden"),
    "light": ("day", "night"),
    "style": ("flat", "outlined", "pixelated", "blurred", "glowing"),
}
DIMENSIONS = {  # and the attributes that each of them judges
    "subject": ("color", "shape"),
    "dynamics": ("motion",),
    "camera": ("camera",),
    "environment": ("place", "light"),
    "style": ("style",),
}
ALWAYS_MENTIONED = ("subject", "dynamics")
NOT_ASKED = "N/A"
UTILITY_WEIGHTS = {"subject": 6, "dynamics": 5, "camera": 3, "environment": 4, "style": 2}
MENTION_PROBABILITY = 0.75
CAMERA_PROBABILITIES = (0.4, 0.2, 0.2, 0.2)
STILL_PROBABILITY = 0.4  # that a wrong motion is none, where motion is asked for
ONE_WRONG_LIMITS = {"subject": (0.4, 0.8), "environment": (0.4, 0.7)}  # severities: first attribute only, second only
GENERATORS = {  # probabilities of 0, 1, 2 and 3 wrong dimensions
    "toygen-a": (0.45, 0.35, 0.15, 0.05),
    "toygen-b": (0.25, 0.40, 0.25, 0.10),
    "toygen-c": (0.10, 0.35, 0.35, 0.20),
}
MAX_TRIES = 50
HELD_OUT_MOTIONS = (  # one set per group
    frozenset({"still", "left", "right", "up"}),
    frozenset({"still", "down", "grows", "shrinks"}),
    frozenset({"still", "right", "down", "grows"}),
)


@dataclass(frozen=True)
class Scene:
    """What a clip shows or a prompt asks for, e.g. Scene("star", "red", "left", "still", "city", "day", "flat")."""

    shape: str
    color: str
    motion: str
    camera: str
    place: str
    light: str
    style: str


@dataclass(frozen=True)
class Request:
    """The content of a prompt: the scene it asks for. Only the dimensions in `mentioned` count."""

    scene: Scene
    mentioned: frozenset[str]


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's (color, shape, motion) triple is reserved for evaluation."""
    color, shape = (
        ATTRIBUTES[name].index(getattr(scene, name)) % len(HELD_OUT_MOTIONS) for name in ("color", "shape")
    )
    return color == shape and scene.motion in HELD_OUT_MOTIONS[color]


def choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def choose_other(rng: np.random.Generator, options: tuple[str, ...], excluded: str) -> str:
    """One of `options` other than `excluded`, uniformly."""
    return choose(rng, tuple(option for option in options if option != excluded))


def _draw(rng: np.random.Generator, attribute: str) -> str:
    if attribute == "camera":
        return ATTRIBUTES[attribute][int(rng.choice(len(CAMERA_PROBABILITIES), p=CAMERA_PROBABILITIES))]
    return choose(rng, ATTRIBUTES[attribute])


def sample_request(rng: np.random.Generator, held_out: bool) -> Request:
    """A request whose scene is held out or not, as asked."""
    values = {name: _draw(rng, name) for name in ("motion", "camera", "place", "light", "style")}
    while True:
        scene = Scene(**values, shape=_draw(rng, "shape"), color=_draw(rng, "color"))
        if is_held_out(scene) == held_out:
            break
    optional = [name for name in DIMENSIONS if name not in ALWAYS_MENTIONED]
    mentioned = [name for name in optional if rng.random() < MENTION_PROBABILITY]
    return Request(scene, frozenset([*ALWAYS_MENTIONED, *mentioned]))


def sample_clip_scene(
    request: Request, rng: np.random.Generator, held_out: bool, *, generator: str = "toygen-b"
) -> Scene:
    """What a clip made for `request` shows: a scene with `generator`'s share of errors, held out or not as asked."""
    mentioned = [name for name in DIMENSIONS if name in request.mentioned]
    probabilities = np.array(GENERATORS[generator][: len(mentioned) + 1])
    num_wrong = int(rng.choice(len(probabilities), p=probabilities / sum(probabilities)))
    wrong = {mentioned[i] for i in rng.choice(len(mentioned), size=num_wrong, replace=False)}
    unmentioned = [name for dimension in DIMENSIONS if dimension not in mentioned for name in DIMENSIONS[dimension]]
    base = replace(request.scene, **{name: _draw(rng, name) for name in unmentioned})
    while True:
        # Severities are drawn before values, so that held-out and other scenes have the same errors. A few training
        # requests have no still scene that is not held out: their severities are drawn again.
        severities = {dimension: float(rng.random()) for dimension in DIMENSIONS if dimension in wrong}
        for _ in range(MAX_TRIES):
            scene = base
            for dimension, severity in severities.items():
                scene = _spoil(scene, dimension, severity, rng)
            if is_held_out(scene) == held_out:
                return scene


def _spoil(scene: Scene, dimension: str, severity: float, rng: np.random.Generator) -> Scene:
    """`scene` with `dimension` wrong. `severity` in [0, 1) decides: one attribute or both, another motion or none."""
    names = DIMENSIONS[dimension]
    if dimension in ONE_WRONG_LIMITS:
        first, second = ONE_WRONG_LIMITS[dimension]
        names = names[:1] if severity < first else names[1:] if severity < second else names
    options = {name: ATTRIBUTES[name] for name in names}
    if dimension in ("dynamics", "camera"):
        (name,) = names
        if getattr(scene, name) != "still" and severity >= 1 - STILL_PROBABILITY:
            return replace(scene, **{name: "still"})
        options[name] = tuple(value for value in ATTRIBUTES[name] if value != "still")
    return replace(scene, **{name: choose_other(rng, options[name], getattr(scene, name)) for name in names})


def true_scores(request: Request, scene: Scene) -> dict[str, Score]:
    """Sub-scores of a clip that shows `scene`, by the rules at the top of this module, in the order of DIMENSIONS."""
    scores: dict[str, Score] = {}
    for dimension, names in DIMENSIONS.items():
        right = [getattr(scene, name) == getattr(request.scene, name) for name in names]
        scores[dimension] = 2 * sum(right) // len(names)
        if dimension in ("dynamics", "camera") and not all(right):
            (name,) = names
            scores[dimension] = int("still" not in (getattr(scene, name), getattr(request.scene, name)))
    return {name: score if name in request.mentioned else NOT_ASKED for name, score in scores.items()}


def overall_score(scores: dict[str, Score]) -> float:
    """1 + 4 * mean(score / 2) over the dimensions that are not "N/A"; 1.0 if all are."""
    counted = [score for score in scores.values() if score != NOT_ASKED]
    return 1.0 + 2.0 * sum(counted) / len(counted) if counted else 1.0


def utility(scores: dict[str, Score]) -> int:
    """The weighted sum that decides preferences. It is an integer, so that ties are exact."""
    return sum(UTILITY_WEIGHTS[name] * score for name, score in scores.items() if score != NOT_ASKED)


def prefer(value_a: float, value_b: float) -> str:
    """The label of a pair: the side with the greater value, "A" or "B", or "same"."""
    return "same" if value_a == value_b else "A" if value_a > value_b else "B"
