"""Scenes, requests, and the rules by which a clip is scored.

A scene is what a clip shows; a request is a scene together with the dimensions that the prompt mentions.

Sub-scores (`true_scores`), "N/A" for a dimension that the prompt does not mention:
    subject      2 shape and color as asked, 1 one of them, 0 neither
    dynamics     2 as asked, 1 moves but in another way than asked, 0 still when asked to move, or the reverse
    camera       2 as asked, 1 moves but in another way than asked, 0 still when asked to move, or the reverse
    environment  2 place and light as asked, 1 one of them, 0 neither
    style        2 as asked, 0 otherwise
    overall      1 + 4 * mean(score / 2) over the dimensions that are not "N/A": 1.00 to 5.00
    utility      the sum over dimensions of UTILITY_WEIGHTS * score ("N/A" counts 0); the clip of higher utility is
                 preferred, and equal utilities are a tie

Subject and dynamics are always mentioned, each other dimension with probability MENTION_PROBABILITY. A clip is wrong
in 0, 1, 2 or 3 of the mentioned dimensions, with the probabilities that GENERATORS gives for the generator that "made"
it; in the dimensions that the prompt does not mention it shows anything.

Held-out scenes: colors and shapes fall into three groups by index modulo 3. A color and a shape of the same group are
held out together with four of the seven motions (48 of 252 triples). Every value and every pair of values still
occurs in training, and each held-out scene has held-out neighbours in color, in shape and in motion.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Score = int | Literal["N/A"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "still")
CAMERAS = ("still", "pans left", "pans right", "zooms in")
PLACES = ("desert", "ocean", "forest", "city", "garden")
LIGHTS = ("day", "night")
STYLES = ("flat", "outlined", "pixelated", "blurred", "glowing")
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
ATTRIBUTES = {
    "shape": SHAPES,
    "color": COLORS,
    "motion": MOTIONS,
    "camera": CAMERAS,
    "place": PLACES,
    "light": LIGHTS,
    "style": STYLES,
}

NOT_ASKED = "N/A"
UTILITY_WEIGHTS = {"subject": 6, "dynamics": 5, "camera": 3, "environment": 4, "style": 2}
MENTION_PROBABILITY = 0.75
CAMERA_PROBABILITIES = (0.4, 0.2, 0.2, 0.2)
GENERATORS = {  # probability of 0, 1, 2, 3 wrong dimensions
    "toygen-a": (0.45, 0.35, 0.15, 0.05),
    "toygen-b": (0.25, 0.40, 0.25, 0.10),
    "toygen-c": (0.10, 0.35, 0.35, 0.20),
}
MAX_TRIES = 50
NUM_HELD_OUT_GROUPS = 3
HELD_OUT_MOTIONS = (
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
    """A prompt's content: the scene asked for; only the dimensions in `mentioned` count, the others are arbitrary."""

    scene: Scene
    mentioned: frozenset[str]


def is_held_out(scene: Scene) -> bool:
    """Whether the (color, shape, motion) triple belongs to evaluation; the other attributes do not matter."""
    group = COLORS.index(scene.color) % NUM_HELD_OUT_GROUPS
    return group == SHAPES.index(scene.shape) % NUM_HELD_OUT_GROUPS and scene.motion in HELD_OUT_MOTIONS[group]


def choose(rng: np.random.Generator, options: tuple, probabilities: tuple | None = None) -> object:
    """One of `options`, uniformly or with the given probabilities."""
    if probabilities is None:
        return options[int(rng.integers(len(options)))]
    return options[int(rng.choice(len(options), p=probabilities))]


def choose_other(rng: np.random.Generator, options: tuple[str, ...], excluded: str) -> str:
    """One of `options` other than `excluded`, uniformly."""
    return choose(rng, tuple(option for option in options if option != excluded))


def sample_request(rng: np.random.Generator, held_out: bool) -> Request:
    """A request whose scene is on the wanted side of `is_held_out`; motions are equally frequent on both sides."""
    motion = choose(rng, MOTIONS)
    camera = choose(rng, CAMERAS, CAMERA_PROBABILITIES)
    scene = Scene("circle", "red", motion, camera, choose(rng, PLACES), choose(rng, LIGHTS), choose(rng, STYLES))
    while True:
        scene = replace(scene, shape=choose(rng, SHAPES), color=choose(rng, COLORS))
        if is_held_out(scene) == held_out:
            break
    optional = [name for name in DIMENSIONS[2:] if rng.random() < MENTION_PROBABILITY]
    return Request(scene, frozenset(DIMENSIONS[:2]) | frozenset(optional))


def sample_clip_scene(
    request: Request, rng: np.random.Generator, held_out: bool, *, generator: str = "toygen-b"
) -> Scene:
    """What a clip made for `request` shows: wrong in as many dimensions as `generator` has it, on its side."""
    mentioned = tuple(name for name in DIMENSIONS if name in request.mentioned)
    probabilities = GENERATORS[generator][: len(mentioned) + 1]
    total = sum(probabilities)
    num_wrong = int(rng.choice(len(probabilities), p=[value / total for value in probabilities]))
    wrong = frozenset(mentioned[i] for i in rng.choice(len(mentioned), size=num_wrong, replace=False))
    base = _fill_unmentioned(request, rng)
    while True:
        # How far a dimension is wrong is drawn before its values, so that errors are alike on both sides. A few
        # requests of the training side have no still scene on their side: then it is drawn again.
        severities = {dimension: float(rng.random()) for dimension in DIMENSIONS if dimension in wrong}
        for _ in range(MAX_TRIES):
            scene = base
            for dimension, severity in severities.items():
                scene = _spoil(scene, dimension, severity, rng)
            if is_held_out(scene) == held_out:
                return scene


def _fill_unmentioned(request: Request, rng: np.random.Generator) -> Scene:
    """The scene asked for, with anything at all in the dimensions that the prompt does not mention."""
    scene = request.scene
    if "camera" not in request.mentioned:
        scene = replace(scene, camera=choose(rng, CAMERAS, CAMERA_PROBABILITIES))
    if "environment" not in request.mentioned:
        scene = replace(scene, place=choose(rng, PLACES), light=choose(rng, LIGHTS))
    if "style" not in request.mentioned:
        scene = replace(scene, style=choose(rng, STYLES))
    return scene


def _spoil(scene: Scene, dimension: str, severity: float, rng: np.random.Generator) -> Scene:
    """`scene` with `dimension` wrong: one attribute or both, another motion or none, by `severity` in [0, 1)."""
    if dimension == "subject":
        parts = ("color",) if severity < 0.4 else ("shape",) if severity < 0.8 else ("color", "shape")
    elif dimension == "environment":
        parts = ("place",) if severity < 0.4 else ("light",) if severity < 0.7 else ("place", "light")
    elif dimension == "style":
        parts = ("style",)
    else:
        attribute = "motion" if dimension == "dynamics" else "camera"
        asked = getattr(scene, attribute)
        if asked != "still" and severity >= 0.6:
            return replace(scene, **{attribute: "still"})
        moving = tuple(value for value in ATTRIBUTES[attribute] if value != "still")
        return replace(scene, **{attribute: choose_other(rng, moving, asked)})
    return replace(scene, **{part: choose_other(rng, ATTRIBUTES[part], getattr(scene, part)) for part in parts})


def true_scores(request: Request, scene: Scene) -> dict[str, Score]:
    """Sub-scores of a clip that shows `scene`, by the rules in the module's docstring, in the order of DIMENSIONS."""
    asked = request.scene
    scores = {
        "subject": int(scene.shape == asked.shape) + int(scene.color == asked.color),
        "dynamics": _motion_score(asked.motion, scene.motion),
        "camera": _motion_score(asked.camera, scene.camera),
        "environment": int(scene.place == asked.place) + int(scene.light == asked.light),
        "style": 2 * int(scene.style == asked.style),
    }
    return {name: scores[name] if name in request.mentioned else NOT_ASKED for name in DIMENSIONS}


def _motion_score(asked: str, shown: str) -> int:
    if asked == shown:
        return 2
    return 0 if "still" in (asked, shown) else 1


def overall_score(scores: dict[str, Score]) -> float:
    """1 + 4 * mean(score / 2) over the dimensions that are not "N/A"; the lowest score, 1.0, when there is none."""
    counted = [score for score in scores.values() if score != NOT_ASKED]
    return 1.0 + 2.0 * sum(counted) / len(counted) if counted else 1.0


def utility(scores: dict[str, Score]) -> int:
    """The weighted sum that decides preferences: an integer, so that ties are exact."""
    return sum(UTILITY_WEIGHTS[name] * score for name, score in scores.items() if score != NOT_ASKED)


def prefer(scores_a: dict[str, Score], scores_b: dict[str, Score]) -> str:
    """The noise-free label of a pair: "A", "B" or "same"."""
    difference = utility(scores_a) - utility(scores_b)
    return "same" if difference == 0 else "A" if difference > 0 else "B"


_MOTION_PHRASES = {"still": "stays still", "grows": "grows", "shrinks": "shrinks"}
_LEADS = ("{subject} {motion}", "There is {subject} that {motion}", "Show {subject} that {motion}")
_PLACE_CLAUSES = (" in the {place} by {light}", " by {light} in the {place}")
_PLACE_SENTENCES = ("The place is the {place} by {light}.", "It is {light} in the {place}.")
_CAMERA_SENTENCES = ("The camera {camera}.", "Camera: it {camera}.", "During the clip the camera {camera}.")
_STYLE_SENTENCES = ("The style is {style}.", "Use the {style} style.", "Style: {style}.")


def motion_phrase(motion: str) -> str:
    """A verb phrase for a motion of the subject or the camera: "moves left", "grows", "stays still", "pans left"."""
    return _MOTION_PHRASES.get(motion, motion if " " in motion else f"moves {motion}")


def write_prompt(request: Request, rng: np.random.Generator) -> str:
    """A prompt that mentions what it has to, e.g. "A red circle grows in the city by day. The style is flat."."""
    scene = request.scene
    subject = choose(rng, ("a {} {}", "one {} {}", "a single {} {}")).format(scene.color, scene.shape)
    lead = choose(rng, _LEADS).format(subject=subject, motion=motion_phrase(scene.motion))
    sentences = []
    if "environment" in request.mentioned:
        names = {"place": scene.place, "light": scene.light}
        if rng.random() < 0.6:
            lead += choose(rng, _PLACE_CLAUSES).format(**names)
        else:
            sentences.append(choose(rng, _PLACE_SENTENCES).format(**names))
    if "camera" in request.mentioned:
        sentences.append(choose(rng, _CAMERA_SENTENCES).format(camera=motion_phrase(scene.camera)))
    if "style" in request.mentioned:
        sentences.append(choose(rng, _STYLE_SENTENCES).format(style=scene.style))
    order = rng.permutation(len(sentences))
    return " ".join([lead[0].upper() + lead[1:] + ".", *(sentences[i] for i in order)])
