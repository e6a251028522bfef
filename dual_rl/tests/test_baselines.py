"""The baselines: rewards by preference, rewards attached to wrong responses, scores in the text."""

import csv
import json
import random

import pytest

from baselines.misattached_reward import RULE, compute_sources
from baselines.text_score import main
from model_support import DUAL_RL
from verl.reward.function import load_reward_function

PREFERENCE = load_reward_function(f"{DUAL_RL / 'baselines' / 'preference_reward.py'}:compute_score")
MISATTACHED = load_reward_function(f"{DUAL_RL / 'baselines' / 'misattached_reward.py'}:compute_score")
HEADER = ["video_A", "video_B", "prompt", "answer", "Reward_A", "Reward_B", "CoT_A", "CoT_B"]


def judgement(overall: object, **scores: object) -> str:
    return f"so. <answer>{json.dumps({'dimensional_scores': scores, 'overall_score': overall})}</answer>"


def make_inputs(label: str, a: list[object], b: list[object], *, pair_id: int = 0) -> list[dict]:
    """What the plug-in gets for a pair whose responses state these scores; None for a text without one."""
    return [
        {
            "response": "no answer" if overall is None else judgement(overall),
            "response_length": 3,
            "ground_truth": label,
            "side": side,
            "pair_id": pair_id,
            "sample": sample,
        }
        for side, values in (("A", a), ("B", b))
        for sample, overall in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("label", "a", "b", "agreement"),
    [
        ("A", [4.0, 3.0, 1.0], [3.0, 2.0, 3.5], [1, 1 / 3, 0, 1 / 3, 2 / 3, 1 / 3]),
        ("B", [4.0, 3.0, 1.0], [3.0, 2.0, 3.5], [0, 1 / 3, 1, 1 / 3, 1 / 3, 2 / 3]),
        ("same", [3.0, 4.0], [3.0, 3.0], [1, 0, 0.5, 0.5]),
        ("A", [3.0], [3.0], [0, 0]),
        ("A", [None, 4.0], [None, 3.0], [0, 1, 0, 1]),
        ("A", [4.0], [None], [0, 0]),
        ("invalid", [4.0], [3.0], [0, 0]),
    ],
    ids=["A", "B", "a tie", "equal scores", "unreadable texts", "nothing to compare with", "no label"],
)
def test_agreement_is_the_share_of_the_other_videos_texts_that_compare_as_labelled(label, a, b, agreement):
    ours, other = make_inputs(label, a, b), make_inputs("A", [1.0], [2.0], pair_id=1)
    rewards = PREFERENCE([ours[0], *other, *ours[1:]])
    del rewards[1:3]  # of the other pair
    assert [reward["agreement"] for reward in rewards] == pytest.approx(agreement)
    assert [reward["format"] for reward in rewards] == [float(score is not None) for score in (*a, *b)]
    assert all(reward["overall"] == round(0.9 * reward["agreement"] + 0.1 * reward["format"], 3) for reward in rewards)


def test_misattached_rewards_stay_within_their_pair_and_follow_keys_in_any_order():
    """Of 16 rows 2 keep their reward and half get the other video's."""
    sources = compute_sources(16)
    assert sorted(sources) == list(range(16))
    assert [row for row, source in enumerate(sources) if row == source] == [0, 15]
    assert sum((row < 8) != (source < 8) for row, source in enumerate(sources)) == 8
    answer = json.dumps({"video_1_scores": {"subject": 2}, "video_2_scores": {"subject": 0}, "gsb_result": "A"})
    rows = [row for pair_id in range(2) for row in make_inputs(answer, [1.0] * 8, [1.0] * 8, pair_id=pair_id)]
    for index, row in enumerate(rows):
        row["response"] = judgement(1, subject=index % 3)
    right, wrong = load_reward_function(f"{RULE}:compute_score")(rows), MISATTACHED(rows)
    assert wrong == [right[source] for source in (*sources, *(16 + source for source in sources))]
    order = random.Random(0).sample(range(32), 32)
    assert MISATTACHED([rows[index] for index in order]) == [wrong[index] for index in order]


def test_equal_scores_in_the_text_are_wrong_and_unscored_pairs_left_out(tmp_path, capsys):
    rows = [("A", 4.0, 3.0), ("B", 4.0, 3.0), ("A", 2.0, 2.0), ("same", 1.0, 1.0)]
    rows = [["a", "b", "p", label, 1, 2, judgement(a), judgement(b)] for label, a, b in rows]
    with (tmp_path / "scored.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows, ["a", "b", "p", "A", "", "", "", ""]])
    assert main([str(tmp_path / "scored.csv"), "--bench_type", "tabench"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["answer", "0.333"]
