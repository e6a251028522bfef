"""The reward plug-in: a user's own Python function, found by path, and all that is checked about what it returns.

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
from types import ModuleType
from typing import Any

from verl.types import PairRollout, ResponseKey

OVERALL = "overall"


class RewardFunctionError(ValueError):
    """A reward plug-in that cannot be loaded, raises, or returns what cannot be used. The message names it."""


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

    Raises RewardFunctionError when file or function is missing, the file does not run, or the function does not take
    `kwargs` beside its inputs.
    """
    path, separator, function_name = spec.rpartition(":")
    if not separator or not function_name.isidentifier():
        raise RewardFunctionError(f"reward_function is {spec!r}; write path.py:function")
    if not Path(path).is_file():
        raise RewardFunctionError(f"reward function {spec}: no file {Path(path).absolute()}; correct reward_function")
    function = getattr(_load_module(Path(path), spec), function_name, None)
    if not callable(function):
        raise RewardFunctionError(
            f"reward function {spec}: the file has no function {function_name!r}; correct its name"
        )
    kwargs = dict(kwargs or {})
    try:
        inspect.signature(function).bind([], **kwargs)
    except TypeError as error:
        raise RewardFunctionError(
            f"reward function {spec} cannot be called with its inputs and reward_function_kwargs {kwargs}: {error}"
        ) from error
    return RewardFunction(name=spec, function=function, kwargs=kwargs)


def _load_module(path: Path, spec: str) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise RewardFunctionError(f"reward function {spec}: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses in the file look themselves up here
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardFunctionError(f"reward function {spec}: {path} does not run: {_describe(error)}") from error
    return module


def score_responses(
    function: RewardFunction, rollouts: Sequence[PairRollout], *, texts: Mapping[ResponseKey, str]
) -> dict[ResponseKey, dict[str, float]]:
    """Scores of every response by its key. `texts`: the decoded CoT of every response in `rollouts`.

    The plug-in is called once with all responses. Raises RewardFunctionError naming the plug-in, the response and the
    remedy when it raises or does not return one dict of finite numbers with `overall` per response.
    """
    inputs = {
        response.key: {
            "response": texts[response.key],
            "response_length": len(response.cot_ids),
            "ground_truth": rollout.pair.answer,
            "side": response.key.side,
            "pair_id": response.key.pair_id,
            "sample": response.key.sample,
        }
        for rollout in rollouts
        for response in rollout.responses
    }
    if not inputs:
        return {}
    try:
        scores = function(list(inputs.values()))
    except Exception as error:
        raise RewardFunctionError(f"reward function {function.name} raised {_describe(error)}") from error
    if not isinstance(scores, list | tuple):
        raise RewardFunctionError(
            f"reward function {function.name} returned {type(scores).__name__}; "
            "return a list with one dict per response"
        )
    if len(scores) != len(inputs):
        raise RewardFunctionError(
            f"reward function {function.name} returned {len(scores)} items for {len(inputs)} responses; "
            "return one dict per response, in their order"
        )
    checked = [_check_item(function.name, index, item) for index, item in enumerate(scores)]
    _require_same_names(function.name, checked)
    return dict(zip(inputs, checked, strict=True))


def _check_item(name: str, index: int, item: object) -> dict[str, float]:
    where = f"reward function {name}, item {index}"
    if not isinstance(item, Mapping):
        raise RewardFunctionError(f"{where}: returned {item!r}; return a dict with {OVERALL!r}")
    if OVERALL not in item:
        raise RewardFunctionError(f"{where}: has no {OVERALL!r} among {sorted(map(str, item))}; add the total reward")
    for key, value in item.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardFunctionError(f"{where}: {key!r} is {value!r}; return finite numbers only")
    return {str(key): float(value) for key, value in item.items()}


def _require_same_names(name: str, scores: Sequence[Mapping[str, float]]) -> None:
    for index, item in enumerate(scores):
        if item.keys() != scores[0].keys():
            raise RewardFunctionError(
                f"reward function {name}, item {index}: has {sorted(item)} where item 0 has {sorted(scores[0])}; "
                "return the same names for every response"
            )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
