"""Metrics of a step against values worked out by hand."""

import math
import time

import pytest
import torch

from verl.trainer.metrics import (
    Stopwatch,
    group_metrics,
    packing_metrics,
    pair_metrics,
    response_metrics,
    reward_metrics,
    throughput_metrics,
)
from verl.types import PairRollout, PreferencePair, Response, ResponseKey


def make_pair(pair_id: int = 0, preference: int | None = 1) -> PreferencePair:
    return PreferencePair(pair_id, ("a.mp4", "b.mp4"), "problem", "A", preference)


def make_response(pair_id: int, side: str, sample: int, *, length: int, is_finished: bool = True) -> Response:
    key = ResponseKey(pair_id, side, sample)
    return Response(key, tuple(range(length)), is_finished, torch.zeros(length + is_finished))


def make_rollout(lengths_a: list[int], lengths_b: list[int], *, prompts: tuple[int, int]) -> PairRollout:
    responses = [
        tuple(make_response(0, side, sample, length=length) for sample, length in enumerate(lengths))
        for side, lengths in (("A", lengths_a), ("B", lengths_b))
    ]
    return PairRollout(make_pair(), *responses, prompt_tokens=prompts)


def test_rewards_are_averaged_by_name():
    rewards = {
        ResponseKey(0, "A", 0): {"overall": 0.2, "sub": 1.0},
        ResponseKey(0, "A", 1): {"overall": 0.6, "sub": 0.0, "rare": 3.0},
        ResponseKey(0, "B", 0): {"overall": 0.4, "sub": 0.5},
    }
    assert reward_metrics(rewards, prefix="val/reward") == pytest.approx(
        {
            "val/reward/overall/mean": 0.4,
            "val/reward/overall/std": (0.08 / 3) ** 0.5,
            "val/reward/overall/min": 0.2,
            "val/reward/overall/max": 0.6,
            "val/reward/sub/mean": 0.5,
            "val/reward/rare/mean": 3.0,
        }
    )


def test_groups_of_equal_scores_are_counted():
    scores = {(0, "A"): (1.0, 1.0), (0, "B"): (0.0, 1.0), (1, "A"): (0.3, 0.3), (1, "B"): (0.0, 0.0)}
    by_response = {
        ResponseKey(*video, sample): score for video, group in scores.items() for sample, score in enumerate(group)
    }
    assert group_metrics(by_response) == pytest.approx({"group/zero_variance": 0.75, "group/std": 0.5**0.5 / 4})
    assert group_metrics({ResponseKey(0, "A", 0): 0.5}) == {"group/zero_variance": 1.0, "group/std": 0.0}


def test_lengths_leave_eos_out_and_cut_responses_are_counted():
    responses = [make_response(0, "A", index, length=n, is_finished=n < 9) for index, n in enumerate((3, 9, 0, 4))]
    assert response_metrics(responses) == {
        "response_length/mean": 4.0,
        "response_length/max": 9.0,
        "response_length/min": 0.0,
        "response_length/clip_ratio": 0.25,
    }


def test_packing_is_measured_against_padded_rows():
    rollouts = [make_rollout([9, 19], [9, 19], prompts=(100, 100)), make_rollout([1], [7], prompts=(10, 20))]
    packed, separate = 260 + (10 + 2 + 20 + 8), 4 * 120 + 2 * 28
    assert packing_metrics(rollouts) == {
        "perf/packed_tokens": packed,
        "perf/packing_efficiency": pytest.approx(packed / separate),
    }
    assert throughput_metrics(rollouts, seconds=2.0, num_devices=3) == {
        "perf/tokens_per_second_per_device": pytest.approx(50.0)
    }


def test_pair_accuracy_is_strict_and_leaves_ties_out():
    preferences = [1, -1, 1, 0, None, -1]
    rewards = [(2.0, 1.0), (2.0, 1.0), (1.0, 1.0), (9.0, 0.0), (9.0, 0.0), (-1.0, 3.0)]
    pairs = [make_pair(index, preference) for index, preference in enumerate(preferences)]
    head_rewards = {
        ResponseKey(index, side, 0): reward
        for index, both in enumerate(rewards)
        for side, reward in zip("AB", both, strict=True)
    }
    expected = {"val/num_decided_pairs": 4.0, "val/gsb_acc": 0.5, "val/reward_margin": (1 - 1 + 0 + 4) / 4}
    expected["val/bt_loss"] = sum(math.log(1 + math.exp(-margin)) for margin in (1, -1, 0, 4)) / 4
    assert pair_metrics(pairs, head_rewards) == pytest.approx(expected)
    in_another_order = dict(reversed(head_rewards.items()))
    assert pair_metrics(pairs[::-1], in_another_order) == pytest.approx(expected)


def test_pair_accuracy_averages_over_the_responses_of_a_video():
    rewards = {"A": (0.0, 4.0), "B": (1.0, 1.0)}
    head_rewards = {ResponseKey(0, side, i): r for side, both in rewards.items() for i, r in enumerate(both)}
    assert pair_metrics([make_pair()], head_rewards) == {
        "val/num_decided_pairs": 1.0,
        "val/gsb_acc": 1.0,
        "val/reward_margin": 1.0,
        "val/bt_loss": pytest.approx((math.log(1 + math.exp(1)) + math.log(1 + math.exp(-3))) / 2),
    }


def test_without_a_preference_there_is_no_accuracy():
    assert pair_metrics([make_pair(0, 0), make_pair(1, None)], {}) == {"val/num_decided_pairs": 0.0}


def test_stopwatch_shares_add_up_to_the_step():
    watch = Stopwatch()
    for phase, seconds in (("generate", 0.02), ("update", 0.03), ("generate", 0.02)):
        with watch(phase):
            time.sleep(seconds)
    time.sleep(0.02)
    metrics = watch.metrics()
    assert metrics["timing/seconds/generate"] >= 0.04
    assert metrics["timing/seconds/step"] >= 0.09
    shares = {name: value for name, value in metrics.items() if name.startswith("timing/share/")}
    assert set(shares) == {"timing/share/generate", "timing/share/update", "timing/share/other"}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_stopwatch_counts_a_phase_that_fails_and_refuses_nesting():
    watch = Stopwatch()
    with pytest.raises(KeyError), watch("save"):
        raise KeyError
    assert watch.seconds["save"] > 0
    with watch("save"), pytest.raises(AssertionError, match="begins within another"):
        watch("update").__enter__()
