"""Preference pairs of the toy world: what is sampled for each, and how far the sample keeps to the intended rates.

A pair is a prompt, two clips made for it, a CoT for each clip, and a label. The label follows from the clips' true
scores (`scene.prefer`); a stated share of the pairs are ties. Training labels then get annotator noise: a stated share
is replaced by one of the two other labels. Evaluation labels are free of noise. A CoT is written by a careful or by a
careless annotator, who takes in each attribute of the clip wrongly at a stated rate, and a stated share of the CoTs
end in JSON that does not parse. All of a pair follows from the settings, the split and the pair's index.

Besides training and evaluation, whose combinations of color, shape and motion never occur in training, there are two
splits to compare evaluation with: `in_domain` has other clips of training's combinations, and `new_rendering` has
these combinations in the rendering that training never shows (renderings.py). Both are free of label noise.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .judge import damage_json, misperceive, parse_scores, write_cot
from .render import Nuisance, sample_nuisance
from .scene import (
    ATTRIBUTES,
    GENERATORS,
    UTILITY_WEIGHTS,
    Request,
    Scene,
    Score,
    choose,
    choose_other,
    is_held_out,
    overall_score,
    prefer,
    sample_clip_scene,
    sample_request,
    true_scores,
    write_prompt,
)

SPLITS = ("train", "eval")
COMPARED_SPLITS = ("in_domain", "new_rendering")
LABELS = ("A", "B", "same")


@dataclass(frozen=True)
class WorldConfig:
    """The seed and the intended rates."""

    seed: int = 0
    tie_share: float = 0.10
    """Share of pairs whose two clips have equal utility."""
    label_noise: float = 0.05
    """Share of training labels replaced by another label."""
    careful_share: float = 0.60
    """Share of CoTs from careful annotators; the others are careless."""
    careful_error: float = 0.03
    """Probability that a careful annotator takes an attribute for another one."""
    careless_error: float = 0.25
    """The same for a careless annotator."""
    malformed_share: float = 0.02
    """Share of CoTs whose JSON does not parse."""

    def validate(self) -> None:
        """Raise ValueError when a rate is not a probability."""
        for name, value in asdict(self).items():
            if name != "seed" and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


@dataclass(frozen=True)
class Clip:
    """One clip: its file name, what it shows, what its annotator saw, and the CoT that came of it."""

    name: str
    generator: str
    scene: Scene
    nuisance: Nuisance
    seen: Scene
    cot: str
    scores: dict[str, Score]


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
    """Pair `index` of `split`, the same whenever it is asked for."""
    rng = np.random.default_rng([config.seed, (*SPLITS, *COMPARED_SPLITS).index(split), index])
    held_out = split == "eval"
    request = sample_request(rng, held_out)
    should_tie = rng.random() < config.tie_share
    while True:
        generators = [choose(rng, tuple(GENERATORS)) for _ in range(2)]
        scenes = [sample_clip_scene(request, rng, held_out, generator=generator) for generator in generators]
        true_label = prefer(*(true_scores(request, scene) for scene in scenes))
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
        clips.append(Clip(name, generator, scene, nuisance, seen, cot, true_scores(request, scene)))
    return Pair(split, request, prompt, (clips[0], clips[1]), true_label, label)


def _annotate(config: WorldConfig, request: Request, scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """What an annotator saw, and the CoT written about it."""
    is_careful = rng.random() < config.careful_share
    seen = misperceive(scene, rng, config.careful_error if is_careful else config.careless_error)
    cot = write_cot(request, seen, rng)
    return seen, damage_json(cot, rng) if rng.random() < config.malformed_share else cot


def measure_rates(pairs: Sequence[Pair]) -> dict[str, float]:
    """Shares found in a sample of pairs, under the names of WorldConfig where it states the intended share.

    The oracle accuracies say how often a rule finds the noise-free label of the pairs that are not ties, when it reads
    the true sub-scores, the true overall scores, or the sub-scores that the CoTs give. A rule that finds two clips
    equal, or cannot read a CoT, is wrong; `..._ties_half` counts half a point instead.
    """
    decided = [pair for pair in pairs if pair.true_label != "same"]
    clips = [clip for pair in pairs for clip in pair.clips]
    num_wrong_attributes = sum(
        value != getattr(clip.scene, name) for clip in clips for name, value in asdict(clip.seen).items()
    )
    from_overall = [_sign(pair, *(overall_score(clip.scores) for clip in pair.clips)) for pair in decided]
    from_cots = [_read_cots(pair) for pair in decided]
    rates = {
        "tie_share": np.mean([pair.true_label == "same" for pair in pairs]),
        "label_noise": np.mean([pair.label != pair.true_label for pair in pairs]),
        "malformed_share": np.mean([parse_scores(clip.cot) is None for clip in clips]),
        "attribute_error": num_wrong_attributes / (len(clips) * len(ATTRIBUTES)),
        "label_A_share": np.mean([pair.label == "A" for pair in pairs]),
        "mean_overall_score": np.mean([overall_score(clip.scores) for clip in clips]),
        "mean_cot_characters": np.mean([len(clip.cot) for clip in clips]),
    }
    if decided:
        truth = [prefer(*(clip.scores for clip in pair.clips)) == pair.true_label for pair in decided]
        rates["oracle_true_scores"] = np.mean(truth)
        rates["oracle_true_overall"] = np.mean([value > 0 for value in from_overall])
        rates["oracle_cot_scores"] = np.mean([value > 0 for value in from_cots])
        rates["oracle_cot_scores_ties_half"] = np.mean([(1 + value) / 2 for value in from_cots])
    return {name: round(float(value), 4) for name, value in rates.items()}


def _sign(pair: Pair, value_a: float, value_b: float) -> int:
    """1 when the greater value belongs to the preferred clip, -1 when to the other one, 0 when they are equal."""
    difference = value_a - value_b if pair.true_label == "A" else value_b - value_a
    return int(np.sign(difference))


def _read_cots(pair: Pair) -> int:
    """`_sign` of the utilities that the two CoTs' own scores give; 0 when one of them does not parse."""
    scores = [parse_scores(clip.cot) for clip in pair.clips]
    if scores[0] is None or scores[1] is None:
        return 0
    label = prefer(scores[0], scores[1])
    return 0 if label == "same" else 1 if label == pair.true_label else -1


def describe_config(config: WorldConfig) -> dict[str, object]:
    """The intended rates and fixed rules, for the manifest."""
    mixed = config.careful_share * config.careful_error + (1 - config.careful_share) * config.careless_error
    return {
        **asdict(config),
        "attribute_error": round(mixed, 4),
        "utility_weights": UTILITY_WEIGHTS,
        "wrong_dimensions_by_generator": {name: list(values) for name, values in GENERATORS.items()},
    }


def check_disjoint(pairs: Sequence[Pair]) -> None:
    """Raise ValueError when a prompt or a (color, shape, motion) triple occurs in training and in evaluation.

    COMPARED_SPLITS are on training's side: a short prompt may by chance be there, too; their clips never are.
    """
    seen: dict[object, str] = {}
    for pair in pairs:
        scenes = [pair.request.scene, *(clip.scene for clip in pair.clips)]
        side = "eval" if pair.split == "eval" else "train"
        for key in (pair.prompt, *((scene.color, scene.shape, scene.motion) for scene in scenes)):
            if seen.setdefault(key, side) != side:
                raise ValueError(f"{key!r} occurs in both splits")
        if any(is_held_out(scene) != (pair.split == "eval") for scene in scenes):
            raise ValueError(f"a scene of {pair.clips[0].name} is on the wrong side of the held-out rule")
