"""Rule reward of a judge's response: 0.7 sub-scores + 0.1 format + 0.2 length, rounded to 3 decimals.

- `sub`: share of the annotated dimensions of the response's own video whose score the response gives. Numbers and
  strings of numbers are equal by value; True is not 1. 0 without a judgement, or when the pair has a bare label only.
- `format`: 1 when an `<answer>...</answer>` holds a JSON object with `dimensional_scores` (the last counts), else 0.
- `length`: of the whole response; see `length_by`.

Set it with worker.reward.reward_function=examples/reward_function/r1ta_subdim_head.py:compute_score. Your own plug-in
is a file with a function like `compute_score`.
"""

from typing import Literal

from descore.answers import JUDGEMENT_KEY, Score, extract_judgement, parse_annotation, parse_score

SUB_WEIGHT, FORMAT_WEIGHT, LENGTH_WEIGHT = 0.7, 0.1, 0.2
CHARACTER_STEPS = ((500, 0.0), (1000, 0.2), (1500, 0.4), (2000, 0.6))  # below so many characters: this reward
SHORTEST_TOKENS, LONGEST_TOKENS = 500, 2000


def compute_score(
    reward_inputs: list[dict], length_by: Literal["characters", "tokens"] = "characters"
) -> list[dict[str, float]]:
    """One dict with `overall`, `sub`, `format` and `length` per response, in order.

    `length_by`: `characters` of the decoded text, in steps: below 500 0, 1000 0.2, 1500 0.4, 2000 0.6, else 1;
    `tokens`, the paper's form: 0 below 500, then linear to 1 at 2000. Raises ValueError for another word, and for a
    `ground_truth` that is not an annotation; whatever the response holds is scored.
    """
    if length_by not in ("characters", "tokens"):
        raise ValueError(f"length_by is {length_by!r}. Choose characters or tokens.")
    return [_score(reward_input, length_by) for reward_input in reward_inputs]


def _score(reward_input: dict, length_by: str) -> dict[str, float]:
    judgement = extract_judgement(reward_input["response"])
    truth = parse_annotation(reward_input["ground_truth"]).scores[reward_input["side"]]
    sub = compute_sub_reward(judgement, truth)
    well_formed = float(judgement is not None)
    if length_by == "characters":
        length = compute_character_reward(len(reward_input["response"]))
    else:
        length = compute_token_reward(reward_input["response_length"])
    overall = round(SUB_WEIGHT * sub + FORMAT_WEIGHT * well_formed + LENGTH_WEIGHT * length, 3)
    return {"overall": overall, "sub": sub, "format": well_formed, "length": length}


def compute_sub_reward(judgement: dict | None, truth: dict[str, Score]) -> float:
    """Share of the dimensions in `truth` on which `judgement["dimensional_scores"]` has the same value."""
    predicted = judgement[JUDGEMENT_KEY] if judgement else None
    if not isinstance(predicted, dict) or not truth:
        return 0.0
    return sum(parse_score(predicted.get(dimension)) == score for dimension, score in truth.items()) / len(truth)


def compute_character_reward(num_characters: int) -> float:
    """0 below 500 characters, 0.2 below 1000, 0.4 below 1500, 0.6 below 2000, else 1."""
    return next((reward for limit, reward in CHARACTER_STEPS if num_characters < limit), 1.0)


def compute_token_reward(num_tokens: int) -> float:
    """0 up to 500 tokens, 1 from 2000 on, linear between."""
    return min(max((num_tokens - SHORTEST_TOKENS) / (LONGEST_TOKENS - SHORTEST_TOKENS), 0.0), 1.0)
