"""The reward plug-in: a user's own Python function, loaded by path, and the checks of what it returns.

    def compute_score(reward_inputs: list[dict], **kwargs) -> list[dict]

gets one dict per response with `response` (decoded text), `response_length` (its tokens, without EOS), `ground_truth`
(the answer cell of the CSV), `side` ("A" or "B"), `pair_id` (the row of the CSV, from 0) and `sample` (which of the
video's responses, from 0), and returns one dict per response, in order, with `overall` and any other numbers, which
are logged. A call has all responses to both videos of its pairs. All dicts that it returns have the same names.
"""

import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.types import PairRollout, ResponseKey

OVERALL = "overall"


class RewardFunctionError(ValueError):
    """A reward plug-in that does not load, raises, or returns something unusable. The message names it."""


@dataclass(frozen=True)
class RewardFunction:
    """A loaded plug-in. `name` is its `path.py:function`; `kwargs` are passed to every call."""

    name: str
    function: Callable[..., list[dict]]
    kwargs: Mapping[str, Any]

    def __call__(self, reward_inputs: list[dict]) -> list[dict]:
        return self.function(reward_inputs, **self.kwargs)


def load_reward_function(spec: str, kwargs: Mapping[str, Any] | None = None) -> RewardFunction:
    """Load `path.py:function`; `kwargs` are passed to every call.

    Raises RewardFunctionError when the file does not run, or has no such function that takes `kwargs`.
    """
    path, _, name = spec.rpartition(":")
    path, kwargs = Path(path), dict(kwargs or {})
    module_spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    if module_spec is None:
        raise RewardFunctionError(f"reward function {spec}: {path} is not a Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses in the file look themselves up here
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardFunctionError(
            f"reward function {spec}: {path} does not run: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardFunctionError(f"reward function {spec}: the file has no function {name!r}. Correct its name.")
    try:
        inspect.signature(function).bind([], **kwargs)
    except TypeError as error:
        raise RewardFunctionError(
            f"reward function {spec} cannot be called with its inputs and reward_function_kwargs {kwargs}: {error}"
        ) from error
    return RewardFunction(name=spec, function=function, kwargs=kwargs)


def score_responses(
    function: RewardFunction, rollouts: Sequence[PairRollout], *, texts: Mapping[ResponseKey, str]
) -> dict[ResponseKey, dict[str, float]]:
    """Scores of every response by its key. `texts`: the decoded CoT of every response in `rollouts`.

    The plug-in is called once with all responses. Raises RewardFunctionError when it raises, or does not return one
    dict of finite numbers with `overall` per response.
    """
    inputs = {
        response.key: {
            "response": texts[response.key],
            "response_length": len(response.cot_ids),
            "ground_truth": rollout.pair.answer,
            **response.key._asdict(),
        }
        for rollout in rollouts
        for response in rollout.responses
    }
    if not inputs:
        return {}
    try:
        scores = function(list(inputs.values()))
    except Exception as error:
        raise RewardFunctionError(f"reward function {function.name} raised {type(error).__name__}: {error}") from error
    found = f"{len(scores)} items" if isinstance(scores, list | tuple) else type(scores).__name__
    if found != f"{len(inputs)} items":
        raise RewardFunctionError(
            f"reward function {function.name} returned {found} for {len(inputs)} responses. Return a list with one "
            "dict per response, in their order."
        )
    for index, item in enumerate(scores):
        if problem := _find_problem(item, scores[0]):
            raise RewardFunctionError(f"reward function {function.name}, item {index}: {problem}")
    by_key = zip(inputs, scores, strict=True)
    return {key: {name: float(value) for name, value in item.items()} for key, item in by_key}


def _find_problem(item: object, first: object) -> str | None:
    """What is wrong with the scores of one response; `first`: those of the first."""
    if not isinstance(item, Mapping) or OVERALL not in item:
        return f"{item!r} is not a dict with {OVERALL!r}, the total reward."
    for name, value in item.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            return f"{name!r} is {value!r}. Return finite numbers only."
    if item.keys() != first.keys():
        return f"has {sorted(item)} where item 0 has {sorted(first)}. Return the same names for every response."
    return None
