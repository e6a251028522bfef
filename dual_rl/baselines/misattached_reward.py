"""The rule reward attached to the wrong responses on purpose, as the original code did, to measure what that costs.

There the rewards of a pair's responses were computed for one order of the rows and attached in another: written as
A_0, B_0, A_1, B_1, ... and read as A_0, A_1, ..., B_0, B_1, .... With 8 responses a video 2 of the 16 rows keep their
own reward, and half get one of the other video. Means over all responses stay as they were.

Set worker.reward.reward_function=baselines/misattached_reward.py:compute_score; keyword arguments go to the rule of
examples/reward_function/r1ta_subdim_head.py.
"""

from collections import defaultdict
from pathlib import Path

from verl.reward.function import load_reward_function

RULE = Path(__file__).resolve().parents[1] / "examples" / "reward_function" / "r1ta_subdim_head.py"


def compute_score(reward_inputs: list[dict], **rule_kwargs: object) -> list[dict[str, float]]:
    """The rule's dicts, in another order within each pair. Raises what the rule raises."""
    right = load_reward_function(f"{RULE}:compute_score", rule_kwargs)(reward_inputs)
    by_pair: dict[int, list[int]] = defaultdict(list)
    for place in sorted(range(len(reward_inputs)), key=lambda place: _order(reward_inputs[place])):
        by_pair[reward_inputs[place]["pair_id"]].append(place)
    wrong = list(right)
    for places in by_pair.values():
        for place, source in zip(places, compute_sources(len(places)), strict=True):
            wrong[place] = right[places[source]]
    return wrong


def compute_sources(num_rows: int) -> list[int]:
    """For each of a pair's rows (A's responses, then B's) the row whose reward it gets.

    Example: 4 rows A_0, A_1, B_0, B_1 get those of A_0, B_0, A_1, B_1: [0, 2, 1, 3].
    """
    assert num_rows % 2 == 0, "a pair has as many responses to A as to B"
    return [place // 2 + num_rows // 2 * (place % 2) for place in range(num_rows)]


def _order(item: dict) -> tuple[int, str, int]:
    return item["pair_id"], item["side"], item["sample"]
