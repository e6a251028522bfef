"""The rule reward attached to the wrong responses on purpose, as the original code did, to measure what that costs.

There the rewards of a pair's responses were computed in one order of the rows and attached in another: written as
A_0, B_0, A_1, B_1, ... and read as A_0, A_1, ..., B_0, B_1, .... With 8 responses per video 2 of the 16 rows keep
their own reward, and half get one of the other video. Means over all responses stay as they were.

Set worker.reward.reward_function=baselines/misattached_reward.py:compute_score; keyword arguments go to the rule of
examples/reward_function/r1ta_subdim_head.py.
"""

from collections import defaultdict
from operator import itemgetter
from pathlib import Path

from verl.reward.function import load_reward_function

RULE = Path(__file__).resolve().parents[1] / "examples" / "reward_function" / "r1ta_subdim_head.py"


def compute_score(reward_inputs: list[dict], **rule_kwargs: object) -> list[dict[str, float]]:
    """The rule's dicts, in another order within each pair. Raises what the rule raises."""
    right = load_reward_function(f"{RULE}:compute_score", rule_kwargs)(reward_inputs)
    pairs: dict[int, list[tuple]] = defaultdict(list)
    for item, reward, index in zip(reward_inputs, right, range(len(right)), strict=True):
        pairs[item["pair_id"]].append((item["side"], item["sample"], index, reward))
    wrong = list(right)
    for rows in pairs.values():
        rows.sort(key=itemgetter(0, 1))
        for (_, _, index, _), source in zip(rows, compute_sources(len(rows)), strict=True):
            wrong[index] = rows[source][-1]
    return wrong


def compute_sources(num_rows: int) -> list[int]:
    """For each of a pair's rows (A's responses, then B's) the row whose reward it gets.

    Example: 4 rows A_0, A_1, B_0, B_1 get those of A_0, B_0, A_1, B_1: [0, 2, 1, 3].
    """
    assert num_rows % 2 == 0, "a pair has as many responses to A as to B"
    return [row // 2 + num_rows // 2 * (row % 2) for row in range(num_rows)]
