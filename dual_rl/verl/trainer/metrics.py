"""What a step tells a researcher, as one flat dict of numbers. Pure: looks at results, not at machines.

Metrics of the update itself (`actor/`, `bt/`, `rollout/`) and of memory are made in the workers, where they are known.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from verl.types import SIDES, PairRollout, PreferencePair, Response, ResponseKey, VideoKey

OVERALL = "overall"


def reward_metrics(rewards: Mapping[ResponseKey, Mapping[str, float]], *, prefix: str = "reward") -> dict[str, float]:
    """Means over responses of everything that the reward function returned; of `overall` also spread and extremes.

    Example: {"overall": 0.5, "sub": 0.4} for every response gives reward/overall/{mean,std,min,max} and
    reward/sub/mean. A number that came with some responses only is averaged over these.
    """
    assert rewards, "no rewards to describe"
    columns: dict[str, list[float]] = defaultdict(list)
    for scores in rewards.values():
        for name, value in scores.items():
            columns[name].append(float(value))
    metrics = {f"{prefix}/{name}/mean": float(np.mean(values)) for name, values in columns.items()}
    overall = columns[OVERALL]
    metrics[f"{prefix}/{OVERALL}/std"] = float(np.std(overall))
    metrics[f"{prefix}/{OVERALL}/min"] = min(overall)
    metrics[f"{prefix}/{OVERALL}/max"] = max(overall)
    return metrics


def group_metrics(scores: Mapping[ResponseKey, float]) -> dict[str, float]:
    """How far scores spread within the groups, which are the responses to one video each.

    `group/zero_variance`: share of groups whose scores are all equal and which therefore teach nothing.
    `group/std`: mean over groups of the scores' unbiased standard deviation, by which advantages are divided.
    """
    groups: dict[VideoKey, list[float]] = defaultdict(list)
    for key, score in scores.items():
        groups[key.video].append(score)
    assert groups, "no groups to describe"
    return {
        "group/zero_variance": sum(min(group) == max(group) for group in groups.values()) / len(groups),
        "group/std": float(np.mean([np.std(group, ddof=1) if len(group) > 1 else 0.0 for group in groups.values()])),
    }


def response_metrics(responses: Sequence[Response], *, prefix: str = "response_length") -> dict[str, float]:
    """Tokens of the responses, EOS left out; `clip_ratio` is the share that was cut at the length limit."""
    assert responses, "no responses to describe"
    lengths = [len(response.cot_ids) for response in responses]
    return {
        f"{prefix}/mean": float(np.mean(lengths)),
        f"{prefix}/max": float(max(lengths)),
        f"{prefix}/min": float(min(lengths)),
        f"{prefix}/clip_ratio": sum(not response.is_finished for response in responses) / len(responses),
    }


def packing_metrics(rollouts: Sequence[PairRollout]) -> dict[str, float]:
    """What packing with a shared prompt saves.

    `perf/packed_tokens`: positions of one forward over all pairs. `perf/packing_efficiency`: these as a share of what
    one row per response would compute, each with its own prompt and `<Reward>`, padded to the longest row of its pair;
    lower is better.

    Example: prompts of 100 tokens, CoTs of 9 and 19 tokens on each video: 2 x (100 + 10 + 20) = 260 packed, against
    4 x 120 = 480, is 0.54.
    """
    packed = sum(rollout.num_tokens for rollout in rollouts)
    separate = sum(len(rollout.responses) * _longest_row(rollout) for rollout in rollouts)
    assert separate, "no rollouts to describe"
    return {"perf/packed_tokens": float(packed), "perf/packing_efficiency": packed / separate}


def _longest_row(rollout: PairRollout) -> int:
    sides = zip(rollout.prompt_tokens, (rollout.responses_a, rollout.responses_b), strict=True)
    return max(prompt + len(response.cot_ids) + 1 for prompt, responses in sides for response in responses)


def throughput_metrics(rollouts: Sequence[PairRollout], *, seconds: float, num_devices: int) -> dict[str, float]:
    """Packed tokens per second of the whole step, rollout included, and per device."""
    tokens = sum(rollout.num_tokens for rollout in rollouts)
    return {"perf/tokens_per_second_per_device": tokens / seconds / num_devices}


def pair_metrics(
    pairs: Sequence[PreferencePair], head_rewards: Mapping[ResponseKey, float], *, prefix: str = "val"
) -> dict[str, float]:
    """How often the head's reward is strictly higher for the preferred video: `gsb_acc`; mean margin; `bt_loss`.

    Ties and rows without a label are left out. For accuracy and margin a video's reward is the mean over its
    responses; of two equal rewards neither is preferred, which counts as wrong. `bt_loss` is Bradley-Terry's over the
    response pairs (A_i, B_i), as in training. Without a single preference there is only their number.
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
    metrics = {f"{prefix}/num_decided_pairs": float(len(margins))}
    if margins:
        metrics[f"{prefix}/gsb_acc"] = sum(margin > 0 for margin in margins) / len(margins)
        metrics[f"{prefix}/reward_margin"] = float(np.mean(margins))
        metrics[f"{prefix}/bt_loss"] = float(np.mean(losses))
    return metrics


class Stopwatch:
    """Seconds of a step by phase. Phases follow one another and may come again; they do not nest.

    Example:
        watch = Stopwatch()
        with watch("rollout"):
            ...
        watch.metrics()   # timing/seconds/{rollout,step}, timing/share/{rollout,other}
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_running = False
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as part of `phase`."""
        assert not self._is_running, f"phase {phase} begins within another"
        self._is_running, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begin
            self._is_running = False

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase and of the step, and each phase's share of it; `other` is what no phase covers."""
        total = max(self.total, 1e-9)
        shares = {phase: seconds / total for phase, seconds in self.seconds.items()}
        return {
            **{f"timing/seconds/{phase}": seconds for phase, seconds in self.seconds.items()},
            "timing/seconds/step": total,
            **{f"timing/share/{phase}": share for phase, share in shares.items()},
            "timing/share/other": max(0.0, 1.0 - sum(shares.values())),
        }
