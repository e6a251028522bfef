"""Reward plug-ins: loading them, scoring through them, and the message when they misbehave."""

import math
from pathlib import Path

import numpy as np
import pytest

from model_support import make_rollout
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


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(PLUGIN)
    return path


ROLLOUTS = [make_rollout(pair, [10 * pair, 10 * pair + 2], [10 * pair + 1, 10 * pair + 3]) for pair in range(2)]
"""Two pairs with two responses per video; each response has another length."""
RESPONSES = [(rollout.pair, response) for rollout in ROLLOUTS for response in rollout.responses]
TEXTS = {response.key: "x" * index for index, (_, response) in enumerate(RESPONSES)}


def score_with(function) -> dict[ResponseKey, dict[str, float]]:
    return score_responses(RewardFunction("plug.py:f", function, {}), ROLLOUTS, texts=TEXTS)


def test_scores_come_back_under_the_key_of_the_response_that_earned_them(plugin):
    scores = score_responses(load_reward_function(f"{plugin}:compute_score", {"scale": 2.0}), ROLLOUTS, texts=TEXTS)
    assert scores == {
        response.key: {"overall": 2.0 * len(TEXTS[response.key]), "tokens": float(len(response.cot_ids))}
        for _, response in RESPONSES
    }


def test_plugin_gets_text_length_annotation_and_key_of_each_response_and_any_real_number_is_taken():
    seen = []

    def record(reward_inputs):
        seen.extend(reward_inputs)
        return [{"overall": np.float32(0.5), "right": True, "count": np.int64(3)} for _ in reward_inputs]

    scores = score_with(record)
    assert seen == [
        {
            "response": TEXTS[response.key],
            "response_length": len(response.cot_ids),
            "ground_truth": pair.answer,
            "side": response.key.side,
            "pair_id": response.key.pair_id,
            "sample": response.key.sample,
        }
        for pair, response in RESPONSES
    ]
    assert scores[ResponseKey(0, "A", 0)] == {"overall": 0.5, "right": 1.0, "count": 3.0}


GOOD = {"overall": 1.0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([GOOD] * 7, "returned 7 items for 8 responses. Return a list with one dict per response"),
        (None, "returned NoneType for 8 responses. Return a list"),
        ([GOOD] * 3 + [1.0] * 5, "item 3: 1.0 is not a dict with 'overall'"),
        ([GOOD] * 5 + [{"score": 1.0}] * 3, "item 5: .'score': 1.0. is not a dict with 'overall'"),
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
        ("{plugin}:absent", {}, "has no function 'absent'"),
        ("{plugin}:two_arguments", {}, "cannot be called.*missing a required argument: 'other'"),
        ("{plugin}:compute_score", {"sacle": 2}, "reward_function_kwargs .*unexpected keyword argument 'sacle'"),
        ("{folder}/notes.txt:f", {}, "Its name must end in .py"),
        ("{folder}/broken.py:f", {}, "broken.py does not run: SyntaxError"),
    ],
)
def test_plugins_that_cannot_be_loaded(plugin, spec, kwargs, message):
    folder = plugin.parent
    (folder / "notes.txt").write_text("")
    (folder / "broken.py").write_text("def f(:\n")
    with pytest.raises(RewardFunctionError, match=message):
        load_reward_function(spec.format(plugin=plugin, folder=folder), kwargs)
