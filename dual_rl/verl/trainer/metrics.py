"""Metrics of a step, as flat dicts of numbers. The workers add those of the update and of memory."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from verl.core.advantages import group_by_video
from verl.types import SIDES, PairRollout, PreferencePair, Response, ResponseKey, VideoKey


def reward_metrics(rewards: Mapping[ResponseKey, Mapping[str, float]], *, prefix: str = "reward") -> dict[str, float]:
    """Means over responses of everything that the reward function returned; of `overall` also spread and extremes.

    Example: {"overall": 0.5, "sub": 0.4} for every response gives reward/overall/{mean,std,min,max} and
    reward/sub/mean. A number that only some responses have is averaged over these.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for scores in rewards.values():
        for name, value in scores.items():
            columns[name].append(value)
    overall = columns["overall"]
    return {
        **{f"{prefix}/{name}/mean": float(np.mean(values)) for name, values in columns.items()},
        f"{prefix}/overall/std": float(np.std(overall)),
        f"{prefix}/overall/min": min(overall),
        f"{prefix}/overall/max": max(overall),
    }


def group_metrics(scores: Mapping[ResponseKey, float]) -> dict[str, float]:
    """How far scores spread within the groups, which are the responses to one video each.

    `group/zero_variance`: share of groups whose scores are all equal and which therefore teach nothing.
    `group/std`: mean over groups of the scores' unbiased standard deviation, by which advantages are divided.
    """
    groups = [list(group.values()) for group in group_by_video(scores).values()]
    return {
        "group/zero_variance": float(np.mean([min(group) == max(group) for group in groups])),
        "group/std": float(np.mean([np.std(group, ddof=1) for group in groups])),
    }


def response_metrics(responses: Sequence[Response], *, prefix: str = "response_length") -> dict[str, float]:
    """Tokens of the responses, EOS left out; `clip_ratio` is the share that was cut at the length limit."""
    lengths = [len(response.cot_ids) for response in responses]
    return {
        f"{prefix}/mean": float(np.mean(lengths)),
        f"{prefix}/max": float(max(lengths)),
        f"{prefix}/min": float(min(lengths)),
        f"{prefix}/clip_ratio": float(np.mean([not response.is_finished for response in responses])),
    }


def speed_metrics(rollouts: Sequence[PairRollout], *, seconds: float, num_devices: int) -> dict[str, float]:
    """Tokens of the packed rows, and how many of them each device managed per second of a step, rollout included."""
    packed = sum(rollout.num_tokens for rollout in rollouts)
    return {
        "perf/packed_tokens": float(packed),
        "perf/tokens_per_second_per_device": packed / seconds / num_devices,
    }


def pair_metrics(pairs: Sequence[PreferencePair], head_rewards: Mapping[ResponseKey, float]) -> dict[str, float]:
    """How often the head's reward is strictly higher for the preferred video: `gsb_acc`; mean margin; `bt_loss`.

    Ties and rows without a label are left out. For accuracy and margin a video's reward is the mean over its
    responses; equal rewards count as wrong. `bt_loss` is Bradley-Terry's over the response pairs (A_i, B_i), as in
    training. Without a single preference, `num_decided_pairs` is all there is.
    """
    by_video: dict[VideoKey, dict[int, float]] = defaultdict(dict)
    for key, reward in head_rewards.items():
        by_video[key.video][key.sample] = reward
    margins, losses = [], []
    for pair in pairs:
        if pair.preference:
            a, b = (by_video[VideoKey(pair.pair_id, side)] for side in SIDES)
            margins.append(pair.preference * float(np.mean(list(a.values())) - np.mean(list(b.values()))))
            losses += [float(np.logaddexp(0.0, -pair.preference * (a[sample] - b[sample]))) for sample in a]
    metrics = {"val/num_decided_pairs": float(len(margins))}
    if margins:
        metrics["val/gsb_acc"] = sum(margin > 0 for margin in margins) / len(margins)
        metrics["val/reward_margin"] = float(np.mean(margins))
        metrics["val/bt_loss"] = float(np.mean(losses))
    return metrics


class Stopwatch:
    """Seconds of a step by phase, timed by `with watch("generate"):`. Phases may come again; they must not nest.

    `on_phase` is called with the name of each phase that begins.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        self.on_phase = on_phase
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.on_phase(phase)
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        """timing/seconds/{PHASE,step} and timing/share/{PHASE,other}; `other` is what no phase covers."""
        total = self.total
        seconds = {f"timing/seconds/{phase}": value for phase, value in self.seconds.items()}
        shares = {f"timing/share/{phase}": value / total for phase, value in self.seconds.items()}
        return {**seconds, "timing/seconds/step": total, **shares, "timing/share/other": 1.0 - sum(shares.values())}
