"""The shipped rule reward against hand-computed values."""

import json
from pathlib import Path

import pytest

from verl.reward.function import load_reward_function

SPEC = Path(__file__).resolve().parents[1] / "examples" / "reward_function" / "r1ta_subdim_head.py"
TRUTH_A = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
TRUTH_B = {"subject": 0, "dynamics": 0, "camera": 1, "environment": "N/A", "style": 2}
ANSWER = f"<answer>{json.dumps({'video_1_scores': TRUTH_A, 'video_2_scores': TRUTH_B, 'gsb_result': 'A'})}</answer>"


def score(response, *, side="A", length=100, ground_truth=ANSWER, **kwargs) -> dict:
    reward_input = {"response": response, "response_length": length, "ground_truth": ground_truth, "side": side}
    return load_reward_function(f"{SPEC}:compute_score", kwargs)([reward_input])[0]


def respond(scores, *, characters=0) -> str:
    answer = f"<answer>{json.dumps({'dimensional_scores': scores})}</answer>"
    return "x" * (characters - len(answer)) + answer


def annotate(**scores) -> str:
    return json.dumps({"video_1_scores": scores})


def test_a_response_is_compared_with_the_scores_of_its_own_video():
    assert score(respond(TRUTH_A, characters=2000)) == {"overall": 1.0, "sub": 1.0, "format": 1.0, "length": 1.0}
    assert score(respond(TRUTH_B), side="B") == {"overall": 0.8, "sub": 1.0, "format": 1.0, "length": 0.0}
    assert score(respond(TRUTH_B), side="A") == {"overall": 0.1, "sub": 0.0, "format": 1.0, "length": 0.0}
    assert score(respond(TRUTH_A) + respond(TRUTH_B))["sub"] == 0.0  # the last answer counts
    assert score(respond(TRUTH_A), ground_truth="A")["sub"] == 0.0  # a bare label leaves nothing to match


def test_overall_is_rounded_to_three_decimals():
    found = score(respond({"subject": 2}, characters=700), ground_truth=annotate(subject=2, dynamics=1, style=0))
    assert found["sub"] == pytest.approx(1 / 3)
    assert found["overall"] == 0.373  # 0.2333 + 0.1 + 0.04


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        *[(value, truth, 1.0) for value in (1, 1.0, "1") for truth in (1, "1")],
        *[(value, truth, 0.0) for value in (True, None, [1], 2, "one") for truth in (1, "1")],
        ("N/A", "N/A", 1.0),
        ("n/a", "N/A", 0.0),
        (0, "N/A", 0.0),
    ],
)
def test_scores_are_equal_by_value_and_not_asked_must_be_said_exactly(predicted, truth, expected):
    assert score(respond({"subject": predicted}), ground_truth=annotate(subject=truth))["sub"] == expected


def test_missing_dimensions_count_as_wrong_and_additional_ones_do_not_count():
    assert score(respond({"subject": 2, "dynamics": 1}))["sub"] == pytest.approx(2 / 5)
    assert score(respond({**TRUTH_A, "beauty": 2}))["sub"] == 1.0


@pytest.mark.parametrize(
    ("response", "well_formed"),
    [
        ("", 0.0),
        ("<answer>not JSON</answer>", 0.0),
        ('<answer>{"overall_score": 2}</answer>', 0.0),
        (respond([2, 1]), 1.0),
        (respond(None), 1.0),
        (respond({"subject": {"score": 2}}), 1.0),
    ],
)
def test_unusable_predictions_score_zero_and_never_raise(response, well_formed):
    found = score(response)
    assert found == {"overall": 0.1 * well_formed, "sub": 0.0, "format": well_formed, "length": 0.0}


@pytest.mark.parametrize(
    ("characters", "expected"),
    [(499, 0.0), (500, 0.2), (999, 0.2), (1000, 0.4), (1499, 0.4), (1500, 0.6), (1999, 0.6), (2000, 1.0)],
)
def test_length_in_characters_goes_in_steps(characters, expected):
    assert score("\u00e9" * characters, length=5000)["length"] == expected


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (500, 0.0), (1250, 0.5), (2000, 1.0), (9999, 1.0)])
def test_length_in_tokens_is_linear_as_in_the_paper(tokens, expected):
    found = score("x", length=tokens, length_by="tokens")
    assert (found["length"], found["overall"]) == pytest.approx((expected, 0.2 * expected))


def test_wrong_settings_and_annotations_are_errors():
    with pytest.raises(ValueError, match="Choose characters or tokens"):
        score("x", length_by="words")
    with pytest.raises(ValueError, match="not a label"):
        score("x", ground_truth="who knows")
