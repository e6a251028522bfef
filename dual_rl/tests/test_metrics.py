"""Metrics of a step against values worked out by hand."""

import math
import time

import pytest

from model_support import make_pair, make_response, make_rollout
from verl.trainer.metrics import (
    Stopwatch,
    group_metrics,
    packing_metrics,
    pair_metrics,
    response_metrics,
    reward_metrics,
)
from verl.types import ResponseKey


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


def test_groups_of_equal_scores_and_cut_responses_are_counted():
    scores = {(0, "A"): (1.0, 1.0), (0, "B"): (0.0, 1.0), (1, "A"): (0.3, 0.3), (1, "B"): (0.0, 0.0)}
    by_response = {ResponseKey(*video, i): score for video, group in scores.items() for i, score in enumerate(group)}
    assert group_metrics(by_response) == pytest.approx({"group/zero_variance": 0.75, "group/std": 0.5**0.5 / 4})
    responses = [make_response(ResponseKey(0, "A", i), n, is_finished=n < 9) for i, n in enumerate((3, 9, 0, 4))]
    expected = {"mean": 4.0, "max": 9.0, "min": 0.0, "clip_ratio": 0.25}  # EOS is left out
    assert response_metrics(responses) == {f"response_length/{name}": value for name, value in expected.items()}


def test_packing_is_measured_against_padded_rows():
    rollouts = [
        make_rollout(0, [9, 19], [9, 19], prompt_tokens=(100, 100)),
        make_rollout(1, [1], [1], prompt_tokens=(10, 20)),
    ]
    packed, separate = 260 + 12 + 22, 4 * 120 + 2 * 22
    assert packing_metrics(rollouts, seconds=2.0, num_devices=3) == {
        "perf/packed_tokens": packed,
        "perf/packing_efficiency": pytest.approx(packed / separate),
        "perf/tokens_per_second_per_device": pytest.approx(packed / 6),
    }


def test_pair_accuracy_is_strict_leaves_ties_out_and_averages_over_responses():
    preferences = [1, -1, 1, 0, None, -1]
    rewards = [((0.0, 4.0), (1.0, 1.0)), (2.0, 1.0), (1.0, 1.0), (9.0, 0.0), (9.0, 0.0), (-1.0, 3.0)]
    head_rewards = {
        ResponseKey(index, side, sample): reward
        for index, both in enumerate(rewards)
        for side, of_side in zip("AB", both, strict=True)
        for sample, reward in enumerate(of_side if isinstance(of_side, tuple) else (of_side,))
    }
    pairs = [make_pair(index, preference) for index, preference in enumerate(preferences)]
    margins = (-1, 3, -1, 0, 4)  # of the decided pairs' responses
    expected = {
        "val/num_decided_pairs": 4.0,
        "val/gsb_acc": 0.5,
        "val/reward_margin": (1 - 1 + 0 + 4) / 4,
        "val/bt_loss": sum(math.log(1 + math.exp(-margin)) for margin in margins) / 5,
    }
    assert pair_metrics(pairs, head_rewards) == pytest.approx(expected)
    assert pair_metrics(pairs[::-1], dict(reversed(head_rewards.items()))) == pytest.approx(expected)
    assert pair_metrics(pairs[3:5], {}) == {"val/num_decided_pairs": 0.0}


def test_stopwatch_shares_add_up_to_the_step():
    watch = Stopwatch()
    for phase in ("generate", "update"):
        with watch(phase):
            time.sleep(0.02)
    metrics = watch.metrics()
    assert 0.02 <= metrics["timing/seconds/generate"] < metrics["timing/seconds/step"]
    shares = {name: value for name, value in metrics.items() if name.startswith("timing/share/")}
    assert set(shares) == {"timing/share/generate", "timing/share/update", "timing/share/other"}
    assert sum(shares.values()) == pytest.approx(1.0)
