"""Metrics of a base model in the toy world, from the chains of thought that it wrote about known clips.

Every share stands beside its prior, the share of the most frequent value: what always answering that value would give.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toy_batches import DIMENSION_ATTRIBUTES
from toy_world.judge import parse_scores
from toy_world.scene import ATTRIBUTES, DIMENSIONS, Request, Scene, motion_phrase, true_scores, utility

DECIMALS = 4


@dataclass(frozen=True)
class Judgement:
    """A clip that shows `scene`, made for `request`, and what the model wrote about it in `num_tokens` tokens."""

    request: Request
    scene: Scene
    cot: str
    num_tokens: int


def read_attributes(cot: str) -> dict[str, str | None]:
    """What the reasoning says the clip shows: for each attribute the first of its values named in its line."""
    lines = {line.split(":", 1)[0].lower(): line.split("prompt", 1)[0] for line in cot.splitlines() if ":" in line}
    named = {}
    for dimension, attributes in DIMENSION_ATTRIBUTES.items():
        line = lines.get(dimension, "")
        for attribute in attributes:
            is_motion = attribute in ("motion", "camera")
            phrases = {value: motion_phrase(value) if is_motion else value for value in ATTRIBUTES[attribute]}
            places = {value: line.find(f" {phrase}") for value, phrase in phrases.items()}
            found = [value for value in places if places[value] >= 0]
            named[attribute] = min(found, key=places.get) if found else None
    return named


def share(outcomes: Sequence[bool | float]) -> float:
    return round(float(np.mean(outcomes)), DECIMALS)


def prior(values: Sequence[object]) -> float:
    """Share of the most frequent value: what one gets by always answering it."""
    return round(Counter(values).most_common(1)[0][1] / len(values), DECIMALS)


def measure_perception(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    """Per attribute: how often the reasoning names what the clip shows."""
    named = [read_attributes(judgement.cot) for judgement in judgements]
    result = {}
    for attribute in ATTRIBUTES:
        truth = [getattr(judgement.scene, attribute) for judgement in judgements]
        right = [said[attribute] == value for said, value in zip(named, truth, strict=True)]
        result[attribute] = {"right": share(right), "prior": prior(truth)}
    return result


def measure_scores(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    """Per dimension: how often the sub-score is right where the prompt mentions it, and N/A where it does not."""
    given = [parse_scores(judgement.cot) or {} for judgement in judgements]
    truth = [true_scores(judgement.request, judgement.scene) for judgement in judgements]
    result = {}
    for name in DIMENSIONS:
        rows = [
            (said.get(name), true[name], name in j.request.mentioned)
            for said, true, j in zip(given, truth, judgements, strict=True)
        ]
        asked = [(said, true) for said, true, is_asked in rows if is_asked]
        result[name] = {
            "right": share([said == true for said, true, _ in rows]),
            "right_if_asked": share([said == true for said, true in asked]),
            "prior_if_asked": prior([true for _, true in asked]),
        }
    keys = ("right", "right_if_asked", "prior_if_asked")
    result["mean"] = {key: share([result[name][key] for name in DIMENSIONS]) for key in keys}
    return result


def measure_pairs(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Preference from the model's own sub-scores against the true one, over pairs that are no true ties."""
    outcomes, num_ties = [], 0
    for a, b in zip(judgements[::2], judgements[1::2], strict=True):
        true_difference = np.sign(np.subtract(*(utility(true_scores(j.request, j.scene)) for j in (a, b))))
        scores = [parse_scores(j.cot) for j in (a, b)]
        own_difference = 0 if None in scores else np.sign(utility(scores[0]) - utility(scores[1]))
        if true_difference != 0:
            outcomes.append(0.5 + 0.5 * true_difference * own_difference)
            num_ties += int(own_difference == 0)
    return {
        "num_pairs": len(outcomes),
        "accuracy": share(outcomes),
        "own_ties": round(num_ties / len(outcomes), DECIMALS),
    }


def summarise(judgements: Sequence[Judgement]) -> dict:
    """All metrics of a list of judged pairs."""
    return {
        "num_clips": len(judgements),
        "json_valid": share([parse_scores(judgement.cot) is not None for judgement in judgements]),
        "characters_per_cot": share([len(judgement.cot) for judgement in judgements]),
        "tokens_per_cot": share([judgement.num_tokens for judgement in judgements]),
        "perception": measure_perception(judgements),
        "sub_scores": measure_scores(judgements),
        "pairs": measure_pairs(judgements),
    }
