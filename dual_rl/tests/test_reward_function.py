"""Reward plug-ins: loading them, scoring through them, the message when they misbehave; and the shipped rule."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from model_support import DUAL_RL, make_rollout
from verl.reward.function import RewardFunction, RewardFunctionError, load_reward_function, score_responses
from verl.types import ResponseKey

PLUGIN = """
from dataclasses import dataclass

@dataclass
class Settings:
    scale: float = 1.0

def compute_score(reward_inputs, scale=1.0):
    scale = Settings(scale).scale
    return [{"overall": scale * len(item["response"]), "tokens": item["response_length"]} for item in reward_inputs]

def two_arguments(reward_inputs, other):
    return []
"""
ROLLOUTS = [make_rollout(pair, [10 * pair, 10 * pair + 2], [10 * pair + 1, 10 * pair + 3]) for pair in range(2)]
"""Two pairs with two responses per video; each response has another length."""
RESPONSES = [(rollout.pair, response) for rollout in ROLLOUTS for response in rollout.responses]
TEXTS = {response.key: "x" * index for index, (_, response) in enumerate(RESPONSES)}


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(PLUGIN)
    return path


def score_with(function) -> dict[ResponseKey, dict[str, float]]:
    return score_responses(RewardFunction("plug.py:f", function, {}), ROLLOUTS, texts=TEXTS)


def test_scores_come_back_under_the_key_of_the_response_that_earned_them(plugin):
    scores = score_responses(load_reward_function(f"{plugin}:compute_score", {"scale": 2.0}), ROLLOUTS, texts=TEXTS)
    assert scores == {
        response.key: {"overall": 2.0 * len(TEXTS[response.key]), "tokens": float(len(response.cot_ids))}
        for _, response in RESPONSES
    }


def test_a_plugin_gets_text_length_annotation_and_key_of_each_response_and_may_return_any_real_number():
    seen = []

    def record(reward_inputs):
        seen.extend(reward_inputs)
        return [{"overall": np.float32(0.5), "right": True, "count": np.int64(3)} for _ in reward_inputs]

    assert score_with(record)[ResponseKey(0, "A", 0)] == {"overall": 0.5, "right": 1.0, "count": 3.0}
    for given, (pair, response) in zip(seen, RESPONSES, strict=True):
        texts = {"response": TEXTS[response.key], "response_length": len(response.cot_ids)}
        assert given == {**texts, "ground_truth": pair.answer, **response.key._asdict()}


GOOD = {"overall": 1.0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([GOOD] * 7, "returned 7 items for 8 responses. Return a list with one dict per response"),
        (None, "returned NoneType for 8 responses. Return a list"),
        ([GOOD] * 3 + [1.0] * 5, "item 3: 1.0 is not a dict"),
        ([GOOD] * 5 + [{"score": 1.0}] * 3, "item 5: .*'overall'"),
        ([{"overall": 1.0, "sub": math.inf}] * 8, "item 0: 'sub' is inf"),
        ([{"overall": "1.0"}] * 8, "item 0: 'overall' is '1.0'. Return finite numbers"),
        ([GOOD] * 6 + [{"overall": 1.0, "extra": 2.0}] * 2, "item 6: has .'extra', 'overall'. where item 0 has"),
    ],
)
def test_unusable_returns_name_plugin_item_and_remedy(items, message):
    with pytest.raises(RewardFunctionError, match=rf"plug\.py:f.*{message}"):
        score_with(lambda reward_inputs: items)


def test_a_plugin_that_raises_is_named_with_its_error():
    with pytest.raises(RewardFunctionError, match=r"plug\.py:f raised KeyError: 'missing'"):
        score_with(lambda reward_inputs: {}["missing"])


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("my_reward.py:absent", {}, "has no function 'absent'"),
        ("my_reward.py:two_arguments", {}, "cannot be called.*missing a required argument: 'other'"),
        ("my_reward.py:compute_score", {"sacle": 2}, "reward_function_kwargs .*unexpected keyword argument 'sacle'"),
        ("broken.py:f", {}, "broken.py does not run: SyntaxError"),
    ],
)
def test_plugins_that_cannot_be_loaded(plugin, spec, kwargs, message):
    plugin.with_name("broken.py").write_text("def f(:\n")
    with pytest.raises(RewardFunctionError, match=message):
        load_reward_function(f"{plugin.parent}/{spec}", kwargs)


RULE = DUAL_RL / "examples" / "reward_function" / "r1ta_subdim_head.py"
TRUTH_A = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}
TRUTH_B = {"subject": 0, "dynamics": 0, "camera": 1, "environment": "N/A", "style": 2}
ANSWER = f"<answer>{json.dumps({'video_1_scores': TRUTH_A, 'video_2_scores': TRUTH_B, 'gsb_result': 'A'})}</answer>"


def score(response, *, side="A", length=100, ground_truth=ANSWER, **kwargs) -> dict:
    reward_input = {"response": response, "response_length": length, "ground_truth": ground_truth, "side": side}
    return load_reward_function(f"{RULE}:compute_score", kwargs)([reward_input])[0]


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
    assert score(respond({"subject": 2, "dynamics": 1}))["sub"] == pytest.approx(2 / 5)
    assert score(respond({**TRUTH_A, "beauty": 2}))["sub"] == 1.0
    found = score(respond({"subject": 2}, characters=700), ground_truth=annotate(subject=2, dynamics=1, style=0))
    assert found["overall"] == 0.373  # 0.2333 + 0.1 + 0.04, rounded


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
    assert score(response) == {"overall": 0.1 * well_formed, "sub": 0.0, "format": well_formed, "length": 0.0}


def test_length_goes_in_steps_of_characters_or_is_linear_in_tokens_as_in_the_paper():
    steps = {499: 0.0, 500: 0.2, 999: 0.2, 1000: 0.4, 1499: 0.4, 1500: 0.6, 1999: 0.6, 2000: 1.0}
    assert {n: score("\u00e9" * n, length=5000)["length"] for n in steps} == steps
    for tokens, expected in ((0, 0.0), (500, 0.0), (1250, 0.5), (2000, 1.0), (9999, 1.0)):
        found = score("x", length=tokens, length_by="tokens")
        assert (found["length"], found["overall"]) == pytest.approx((expected, 0.2 * expected))
    with pytest.raises(ValueError, match="Choose characters or tokens"):
        score("x", length_by="words")
    with pytest.raises(ValueError, match="not a label"):
        score("x", ground_truth="who knows")
