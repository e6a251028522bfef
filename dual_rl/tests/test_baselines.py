"""What thinking, then scoring, is compared with: rewards by preference, rewards put wrongly, scores in the text."""

import csv
import itertools
import json
from pathlib import Path

import pytest

from baselines.misattached_reward import RULE, compute_sources
from baselines.text_score import compute_text_margin, main, read_text_margins
from descore.answers import extract_overall
from verl.reward.function import load_reward_function, score_responses
from verl.types import PairRollout, PreferencePair, Response, ResponseKey

BASELINES = Path(__file__).resolve().parents[1] / "baselines"
PREFERENCE = load_reward_function(f"{BASELINES / 'preference_reward.py'}:compute_score")
MISATTACHED = load_reward_function(f"{BASELINES / 'misattached_reward.py'}:compute_score")
LABELS = {1: "A", -1: "B", 0: "same", None: "invalid"}


def judgement(overall: object, **scores: object) -> str:
    return f"so. <answer>{json.dumps({'dimensional_scores': scores, 'overall_score': overall})}</answer>"


def make_inputs(overalls: dict[str, list[object]], preference: int | None, *, pair_id: int = 0) -> list[dict]:
    """What the plug-in gets for a pair whose responses state these scores; "none" for a text without one."""
    return [
        {
            "response": "no answer" if overall == "none" else judgement(overall),
            "response_length": 3,
            "ground_truth": LABELS[preference],
            "side": side,
            "pair_id": pair_id,
            "sample": sample,
        }
        for side, values in overalls.items()
        for sample, overall in enumerate(values)
    ]


# The generative baseline


def test_agreement_is_the_share_of_the_other_videos_responses_that_stand_as_the_label_says():
    rewards = PREFERENCE(make_inputs({"A": [4.0, 3.0, 1.0], "B": [3.0, 2.0, 3.5]}, 1))
    assert [reward["agreement"] for reward in rewards] == pytest.approx([1.0, 1 / 3, 0, 1 / 3, 2 / 3, 1 / 3])
    assert rewards[1]["overall"] == round(0.9 / 3 + 0.1, 3)
    reversed_label = PREFERENCE(make_inputs({"A": [4.0, 3.0, 1.0], "B": [3.0, 2.0, 3.5]}, -1))
    assert [reward["agreement"] for reward in reversed_label] == pytest.approx([0, 1 / 3, 1, 1 / 3, 1 / 3, 2 / 3])


def test_swapping_the_videos_and_the_label_swaps_the_rewards():
    for first, second in itertools.product([[1.0, 2.5], [2.5, "none"]], [[2.5, 5.0], [1.0, 1.0]]):
        one = PREFERENCE(make_inputs({"A": first, "B": second}, 1))
        other = PREFERENCE(make_inputs({"A": second, "B": first}, -1))
        assert one == other[2:] + other[:2]


def test_a_tie_is_agreed_with_by_equal_scores_only():
    rewards = PREFERENCE(make_inputs({"A": [3.0, 4.0], "B": [3.0, 3.0]}, 0))
    assert [reward["agreement"] for reward in rewards] == [1.0, 0.0, 0.5, 0.5]


def test_equal_scores_agree_with_no_preference():
    assert [reward["agreement"] for reward in PREFERENCE(make_inputs({"A": [3.0], "B": [3.0]}, 1))] == [0.0, 0.0]


def test_a_text_without_a_score_earns_nothing_and_is_compared_with_nothing():
    rewards = PREFERENCE(make_inputs({"A": ["none", 4.0], "B": ["none", 3.0]}, 1))
    assert [reward["overall"] for reward in rewards] == [0.0, 1.0, 0.0, 1.0]
    alone = PREFERENCE(make_inputs({"A": [4.0], "B": ["none"]}, 1))
    assert [(reward["agreement"], reward["format"]) for reward in alone] == [(0.0, 1.0), (0.0, 0.0)]


def test_without_a_label_only_the_form_counts():
    assert {reward["overall"] for reward in PREFERENCE(make_inputs({"A": [4.0], "B": [3.0]}, None))} == {0.1}


def test_pairs_of_one_call_are_told_apart():
    first, second = make_inputs({"A": [4.0], "B": [3.0]}, 1), make_inputs({"A": [1.0], "B": [2.0]}, 1, pair_id=1)
    assert PREFERENCE(first + second) == PREFERENCE(first) + PREFERENCE(second)
    assert PREFERENCE([*first[:1], *second, *first[1:]]) == [*PREFERENCE(first)[:1], *PREFERENCE(second), {
        "overall": 1.0, "agreement": 1.0, "format": 1.0}]  # fmt: skip


# Rewards on wrong responses


def test_of_16_rows_2_keep_their_reward_and_half_get_the_other_videos():
    sources = compute_sources(16)
    assert sorted(sources) == list(range(16))
    assert [place for place, source in enumerate(sources) if place == source] == [0, 15]
    assert sum((place < 8) != (source < 8) for place, source in enumerate(sources)) == 8


def test_rewards_are_attached_within_their_pair_by_key_whatever_the_order_of_the_rows():
    responses = [Response(ResponseKey(pair_id, side, n), (1,), True, None)
                 for pair_id in range(2) for side in "AB" for n in range(8)]  # fmt: skip
    texts = {response.key: judgement(1, subject=index % 3) for index, response in enumerate(responses)}
    answer = json.dumps({"video_1_scores": {"subject": 2}, "video_2_scores": {"subject": 0}, "gsb_result": "A"})
    rollouts = []
    for pair_id in range(2):
        pair = PreferencePair(pair_id, ("a", "b"), "problem", answer, 1)
        sides = [tuple(r for r in responses if r.key[:2] == (pair_id, side)) for side in "AB"]
        rollouts.append(PairRollout(pair, *sides, prompt_tokens=(1, 1)))
    right = score_responses(load_reward_function(f"{RULE}:compute_score"), rollouts, texts=texts)
    wrong = score_responses(MISATTACHED, rollouts, texts=texts)
    for pair_id in range(2):
        keys = [response.key for response in responses if response.key.pair_id == pair_id]
        assert [wrong[key] for key in keys] == [right[keys[source]] for source in compute_sources(16)]
    shuffled = score_responses(MISATTACHED, rollouts[::-1], texts=texts)
    assert shuffled == wrong
    assert right != wrong


# Scores in the text


@pytest.mark.parametrize(
    ("overall", "expected"),
    [(3, 3.0), (3.5, 3.5), (True, None), ("3.5", None), (None, None), (float("nan"), None), (float("inf"), None),
     (10**400, None), ([3], None)],
)  # fmt: skip
def test_only_a_sane_number_is_a_score(overall, expected):
    assert extract_overall(judgement(overall)) == expected


def test_a_response_without_answer_or_score_has_none():
    assert extract_overall("4.5") is None
    assert extract_overall('<answer>{"dimensional_scores": {}}</answer>') is None
    assert compute_text_margin(judgement(4.5), judgement(2)) == 2.5
    assert compute_text_margin(judgement(4.5), "nothing") == 0.0


def write_scored(path: Path) -> Path:
    """Four scored pairs in two sets, and one that could not be scored."""
    rows = [("A", 4.0, 3.0, "x"), ("B", 4.0, 3.0, "x"), ("A", 2.0, 2.0, "y"), ("same", 1.0, 1.0, "y")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_A", "video_B", "prompt", "answer", "set", "Reward_A", "Reward_B", "CoT_A", "CoT_B"])
        for label, a, b, name in rows:
            writer.writerow(["a.mp4", "b.mp4", "p", label, name, 1, 2, judgement(a), judgement(b)])
        writer.writerow(["a.mp4", "b.mp4", "p", "A", "y", "", "", "", ""])
    return path


def test_margins_of_texts_are_grouped_by_a_column(tmp_path):
    path = write_scored(tmp_path / "scored.csv")
    assert read_text_margins(str(path), "tabench", by="set") == {
        ("answer", "x"): [(1.0, 1), (1.0, -1)],
        ("answer", "y"): [(0.0, 1), (0.0, 0)],
    }


def test_reasoning_columns_of_react_files_are_not_labels(tmp_path):
    columns = ["path_A", "path_B", "prompt", "GSB_MQ", "GSB_MQ_A_reasoning", "Reward_A", "Reward_B", "CoT_A", "CoT_B"]
    with (tmp_path / "scored.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, ["a", "b", "p", "A", "it is blurred", 1, 2, judgement(3), judgement(2)]])
    assert read_text_margins(str(tmp_path / "scored.csv"), "react") == {("GSB_MQ",): [(1.0, 1)]}


def test_command_prints_accuracies_in_which_equal_scores_are_wrong(tmp_path, capsys):
    arguments = [str(write_scored(tmp_path / "scored.csv")), "--bench_type", "tabench"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "0.333" in shown
    assert "3 + 1" in shown
    assert main([*arguments, "--by", "sett"]) == 1
    assert "it has no sett" in capsys.readouterr().err
