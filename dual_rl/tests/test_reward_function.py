"""Loading reward plug-ins, scoring through them, and what happens when they misbehave."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from verl.reward.function import RewardFunction, RewardFunctionError, load_reward_function, score_responses
from verl.types import PairRollout, PreferencePair, Response, ResponseKey

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

not_a_function = 3
"""


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(PLUGIN)
    return path


def make_rollouts(num_pairs=2, n=2) -> list[PairRollout]:
    rollouts = []
    for pair_id in range(num_pairs):
        pair = PreferencePair(pair_id, ("a.mp4", "b.mp4"), "problem", f"answer {pair_id}", 1)
        sides = []
        for side in "AB":
            keys = [ResponseKey(pair_id, side, sample) for sample in range(n)]
            ids = [tuple(range(10 * pair_id + key.sample + (side == "B"))) for key in keys]
            sides.append(tuple(Response(k, i, True, torch.zeros(len(i) + 1)) for k, i in zip(keys, ids, strict=True)))
        rollouts.append(PairRollout(pair, *sides, prompt_tokens=(3, 3)))
    return rollouts


ROLLOUTS = make_rollouts()
TEXTS = {response.key: "x" * i for i, response in enumerate(r for rollout in ROLLOUTS for r in rollout.responses)}


def score_with(function, rollouts=ROLLOUTS, texts=TEXTS):
    return score_responses(RewardFunction("plug.py:f", function, {}), rollouts, texts=texts)


def test_scores_come_back_under_the_key_of_the_response_that_earned_them(plugin):
    scores = score_responses(load_reward_function(f"{plugin}:compute_score", {"scale": 2.0}), ROLLOUTS, texts=TEXTS)
    assert set(scores) == set(TEXTS)
    for rollout in ROLLOUTS:
        for response in rollout.responses:
            expected = {"overall": 2.0 * len(TEXTS[response.key]), "tokens": float(len(response.cot_ids))}
            assert scores[response.key] == expected


def test_plugin_gets_text_length_annotation_and_key_of_each_response():
    seen = []

    def record(reward_inputs):
        seen.extend(reward_inputs)
        return [{"overall": 0} for _ in reward_inputs]

    score_with(record)
    responses = [(rollout.pair, response) for rollout in ROLLOUTS for response in rollout.responses]
    assert seen == [
        {
            "response": TEXTS[response.key],
            "response_length": len(response.cot_ids),
            "ground_truth": pair.answer,
            "side": response.key.side,
            "pair_id": response.key.pair_id,
            "sample": response.key.sample,
        }
        for pair, response in responses
    ]


def test_any_real_number_is_taken_as_float():
    items = [{"overall": np.float32(0.5), "right": True, "count": np.int64(3)}] * 8
    scores = score_with(lambda reward_inputs: items)
    assert scores[ResponseKey(0, "A", 0)] == {"overall": 0.5, "right": 1.0, "count": 3.0}
    assert all(type(value) is float for item in scores.values() for value in item.values())


def test_nothing_to_score_does_not_call_the_plugin():
    assert score_with(None, rollouts=[], texts={}) == {}


GOOD = {"overall": 1.0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([GOOD] * 7, "returned 7 items for 8 responses. Return a list with one dict per response"),
        ([GOOD] * 9, "returned 9 items for 8 responses"),
        (None, "returned NoneType for 8 responses. Return a list"),
        ([GOOD] * 3 + [1.0] * 5, "item 3: 1.0 is not a dict. Return a dict"),
        ([GOOD] * 5 + [{"score": 1.0}] * 3, "item 5: has no 'overall' among .'score'."),
        ([GOOD] * 7 + [{"overall": math.nan}], "item 7: 'overall' is nan. Return finite numbers"),
        ([{"overall": 1.0, "sub": math.inf}] * 8, "item 0: 'sub' is inf"),
        ([{"overall": "1.0"}] * 8, "item 0: 'overall' is '1.0'"),
        ([{"overall": None}] * 8, "item 0: 'overall' is None"),
        ([{"overall": 1 + 2j}] * 8, "'overall' is .1.2j."),
        ([GOOD] * 6 + [{"overall": 1.0, "extra": 2.0}] * 2, "item 6: has .'extra', 'overall'. where item 0 has"),
    ],
)
def test_unusable_returns_name_plugin_item_and_remedy(items, message):
    with pytest.raises(RewardFunctionError, match=message) as raised:
        score_with(lambda reward_inputs: items)
    assert "plug.py:f" in str(raised.value)


def test_plugin_that_raises_is_named_with_its_error():
    def fail(reward_inputs):
        raise KeyError("missing")

    with pytest.raises(RewardFunctionError, match=r"plug\.py:f raised KeyError: 'missing'") as raised:
        score_with(fail)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("{folder}/absent.py:compute_score", {}, "absent.py does not run: FileNotFoundError"),
        ("{plugin}:absent", {}, "has no function 'absent'"),
        ("{plugin}:not_a_function", {}, "has no function 'not_a_function'"),
        ("{plugin}:two_arguments", {}, "cannot be called.*missing a required argument: 'other'"),
        ("{plugin}:compute_score", {"sacle": 2}, "reward_function_kwargs .*unexpected keyword argument 'sacle'"),
        ("{folder}/notes.txt:f", {}, "Its name must end in .py"),
        ("{folder}/broken.py:f", {}, "broken.py does not run: SyntaxError"),
        ("{folder}/raises.py:f", {}, "raises.py does not run: ModuleNotFoundError"),
    ],
)
def test_plugins_that_cannot_be_loaded(plugin, spec, kwargs, message):
    folder = plugin.parent
    (folder / "notes.txt").write_text("")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(RewardFunctionError, match=message):
        load_reward_function(spec.format(plugin=plugin, folder=folder), kwargs)


def test_two_files_of_one_name_are_two_plugins(tmp_path):
    functions = []
    for index in range(2):
        path = tmp_path / str(index) / "reward.py"
        path.parent.mkdir()
        path.write_text(f"def f(inputs):\n    return [{{'overall': {index}}} for _ in inputs]\n")
        functions.append(load_reward_function(f"{path}:f"))
    scores = [score_responses(function, ROLLOUTS, texts=TEXTS) for function in functions]
    assert [item[ResponseKey(0, "A", 0)]["overall"] for item in scores] == [0.0, 1.0]
