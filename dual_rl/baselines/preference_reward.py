"""Reward of the generative baseline: the score is written in the text, and the text is rewarded by preference.

Thinking and scoring are coupled: the only score is the `overall_score` that the response states.

- `agreement`: share of the other video's readable responses to which this response's score compares as the label says:
  higher where its own video is preferred, lower where the other is, equal for a tie. 0 when its score or all of the
  others cannot be read, or the pair has no label. Equal scores agree with no preference, as in accuracy.
- `format`: 1 when the score can be read, else 0.
- `overall`: 0.9 agreement + 0.1 format.

Train with worker.reward.reward_function=baselines/preference_reward.py:compute_score worker.actor.bt_weight=0
worker.actor.model.trainable_head=false, and read accuracies with text_score.py. It uses `pair_id` and `side` of its
inputs to find the other video's responses.
"""

from collections import defaultdict

from descore.answers import extract_overall, parse_annotation

AGREEMENT_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1
OTHER = {"A": "B", "B": "A"}


def compute_score(reward_inputs: list[dict]) -> list[dict[str, float]]:
    """One dict with `overall`, `agreement` and `format` per response, in order.

    Raises ValueError for a `ground_truth` that is no annotation; any response is scored.
    """
    scores = [extract_overall(item["response"]) for item in reward_inputs]
    by_video: dict[tuple[int, str], list[float]] = defaultdict(list)
    for item, score in zip(reward_inputs, scores, strict=True):
        if score is not None:
            by_video[item["pair_id"], item["side"]].append(score)
    rewards = []
    for item, score in zip(reward_inputs, scores, strict=True):
        preference = parse_annotation(item["ground_truth"]).preference
        if preference is not None and item["side"] == "B":
            preference = -preference
        agreement = compute_agreement(score, by_video[item["pair_id"], OTHER[item["side"]]], preference=preference)
        readable = float(score is not None)
        overall = round(AGREEMENT_WEIGHT * agreement + FORMAT_WEIGHT * readable, 3)
        rewards.append({"overall": overall, "agreement": agreement, "format": readable})
    return rewards


def compute_agreement(score: float | None, others: list[float], *, preference: int | None) -> float:
    """Share of `others` to which `score` compares as `preference` says: +1 higher, -1 lower, 0 equal.

    Example: 4.0 against (3.0, 4.0, 5.0, 2.0) with preference +1 is higher than two of four: 0.5.
    """
    if score is None or preference is None or not others:
        return 0.0
    return sum((score > other) - (score < other) == preference for other in others) / len(others)
