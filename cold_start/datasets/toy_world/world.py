"""Preference pairs of the toy world: how they are sampled, and the rates measured in a sample.

A pair is a prompt, two clips made for it, a CoT for each clip, and a label, which follows from the clips' true scores.
Only training labels carry annotator noise. Settings, split and index determine everything about a pair.

The combinations of color, shape and motion in "train" never occur in "eval"; "in_domain" and "new_rendering" have
training's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .render import Nuisance, sample_nuisance
from .scene import (
    ATTRIBUTES,
    GENERATORS,
    Request,
    Scene,
    Score,
    choose,
    choose_other,
    prefer,
    sample_clip_scene,
    sample_request,
    true_scores,
    utility,
)
from .texts import damage_json, misperceive, parse_scores, write_cot, write_prompt

SPLITS = ("train", "eval", "in_domain", "new_rendering")
LABELS = ("A", "B", "same")


@dataclass(frozen=True)
class WorldConfig:
    """The seed and the intended rates.

    `tie_share`: of the pairs, those whose clips have equal utility. `label_noise`: of the training labels, those
    replaced by another. `careful_share`: of the CoTs, those of careful annotators, who misperceive an attribute with
    probability `careful_error`; the others do with `careless_error`. `malformed_share`: of the CoTs, those whose JSON
    does not parse.
    """

    seed: int = 0
    tie_share: float = 0.10
    label_noise: float = 0.05
    careful_share: float = 0.60
    careful_error: float = 0.03
    careless_error: float = 0.25
    malformed_share: float = 0.02


@dataclass(frozen=True)
class Clip:
    """One clip: its file name, what it shows, its true scores, what its annotator saw, and the annotator's CoT."""

    name: str
    generator: str
    scene: Scene
    nuisance: Nuisance
    scores: dict[str, Score]
    seen: Scene
    cot: str


@dataclass(frozen=True)
class Pair:
    """Two clips for one prompt. `true_label` follows from the scores, `label` may carry annotator noise."""

    split: str
    request: Request
    prompt: str
    clips: tuple[Clip, Clip]
    true_label: str
    label: str


def sample_pair(config: WorldConfig, split: str, index: int) -> Pair:
    """Pair `index` of `split`. The same arguments give the same pair."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    held_out = split == "eval"
    request = sample_request(rng, held_out)
    should_tie = rng.random() < config.tie_share
    while True:
        generators = [choose(rng, tuple(GENERATORS)) for _ in range(2)]
        scenes = [sample_clip_scene(request, rng, held_out, generator=generator) for generator in generators]
        true_label = prefer(*(utility(true_scores(request, scene)) for scene in scenes))
        if (true_label == "same") == should_tie:
            break
    is_noisy = split == "train" and rng.random() < config.label_noise
    label = choose_other(rng, LABELS, true_label) if is_noisy else true_label
    prompt = write_prompt(request, rng)
    clips = []
    for side, generator, scene in zip("ab", generators, scenes, strict=True):
        nuisance = sample_nuisance(rng, "changed" if split == "new_rendering" else "usual")
        seen, cot = _annotate(config, request, scene, rng)
        name = f"{split}_{index:05d}_{side}.mp4"
        clips.append(Clip(name, generator, scene, nuisance, true_scores(request, scene), seen, cot))
    return Pair(split, request, prompt, (clips[0], clips[1]), true_label, label)


def _annotate(config: WorldConfig, request: Request, scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """What an annotator saw, and the CoT written about it."""
    is_careful = rng.random() < config.careful_share
    seen = misperceive(scene, rng, config.careful_error if is_careful else config.careless_error)
    cot = write_cot(request, seen, rng)
    return seen, damage_json(cot, rng) if rng.random() < config.malformed_share else cot


def measure_rates(pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares found in a sample of pairs, and how far the scores in the CoTs can be trusted.

    `oracle_cot_scores`: among pairs that are not ties, how often these scores give the noise-free label. Equal scores
    and CoTs that do not parse count as wrong.
    """
    clips = [clip for pair in pairs for clip in pair.clips]
    is_right = []
    for pair in (pair for pair in pairs if pair.true_label != "same"):
        read = [parse_scores(clip.cot) for clip in pair.clips]
        is_right.append(None not in read and prefer(*map(utility, read)) == pair.true_label)
    errors = [getattr(clip.seen, name) != getattr(clip.scene, name) for clip in clips for name in ATTRIBUTES]
    rates = {
        "tie_share": np.mean([pair.true_label == "same" for pair in pairs]),
        "label_noise": np.mean([pair.label != pair.true_label for pair in pairs]),
        "malformed_share": np.mean([parse_scores(clip.cot) is None for clip in clips]),
        "attribute_error": np.mean(errors),
        "oracle_cot_scores": np.mean(is_right or [0.0]),
    }
    return {name: round(float(value), 4) for name, value in rates.items()}
