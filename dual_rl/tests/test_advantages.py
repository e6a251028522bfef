"""Group advantages against hand-computed values, NumPy, and what they promise about identity."""

import random

import numpy as np
import pytest

from verl.core.advantages import STD_EPSILON, compute_advantages, compute_group_means
from verl.types import ResponseKey, VideoKey


def make_scores(groups: dict[tuple[int, str], list[float]]) -> dict[ResponseKey, float]:
    return {ResponseKey(*video, i): s for video, scores in groups.items() for i, s in enumerate(scores)}


@pytest.mark.parametrize(
    ("estimator", "scores", "expected"),
    [
        # mean 0.5, unbiased variance 1 / 3, std 0.57735: +-0.5 / 0.577351
        ("grpo", [0.0, 0.0, 1.0, 1.0], [-0.8660239, -0.8660239, 0.8660239, 0.8660239]),
        ("rloo", [1.0, 2.0, 6.0], [1 - 4.0, 2 - 3.5, 6 - 1.5]),  # the score less the mean of the others
    ],
)
def test_advantages_equal_hand_computed_values(estimator, scores, expected):
    advantages = compute_advantages(make_scores({(0, "A"): scores}), estimator=estimator)
    assert list(advantages.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("scores", [[0.1] * 7, [0.7], [0.1 + 0.2, 0.1 + 0.2], [0.0, -0.0]])
def test_group_of_equal_scores_gets_exactly_zero(estimator, scores):
    advantages = compute_advantages(make_scores({(0, "B"): scores, (1, "B"): [1.0, 2.0]}), estimator=estimator)
    assert [advantages[ResponseKey(0, "B", i)] for i in range(len(scores))] == [0.0] * len(scores)


def test_advantages_agree_with_numpy_and_follow_their_keys_through_any_order():
    rng = np.random.default_rng(0)
    groups = {(pair, side): rng.random(8).round(2).tolist() for pair in range(5) for side in "AB"}
    items = list(make_scores(groups).items())
    random.Random(0).shuffle(items)
    advantages = compute_advantages(dict(items), estimator="grpo")
    assert list(advantages) == [key for key, _ in items]
    for video, scores in groups.items():
        expected = (np.array(scores) - np.mean(scores)) / (np.std(scores, ddof=1) + STD_EPSILON)
        assert [advantages[ResponseKey(*video, i)] for i in range(8)] == pytest.approx(expected.tolist(), abs=1e-12)


def test_group_means_are_taken_over_the_responses_to_one_video():
    scores = make_scores({(0, "A"): [1.0, 3.0], (0, "B"): [2.0, 2.0], (1, "A"): [4.0]})
    assert compute_group_means(scores) == {VideoKey(0, "A"): 2.0, VideoKey(0, "B"): 2.0, VideoKey(1, "A"): 4.0}


def test_a_score_that_is_not_finite_never_becomes_an_advantage():
    with pytest.raises(AssertionError, match=r"pair_id=2.*nan"):
        compute_advantages(make_scores({(2, "A"): [0.0, float("nan")]}), estimator="grpo")
