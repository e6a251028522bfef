"""Signs that a generator games the reward: the last WINDOW videos of each client run against the calibration.

The calibration is what `inference.py --calibrate` kept of a validation set. Signs, for at least MIN_VIDEOS videos:

mean       it differs by over MAX_SHIFT of the calibration's standard deviations: such rewards were hardly validated,
           and a proxy that is optimised for too long gets there (Gao, Schulman and Hilton 2023)
spread     the standard deviation, over the calibration's, is outside of [MIN_SPREAD, 1 / MIN_SPREAD]
agreement  of the pairs of videos whose thoughts give different means of sub-scores, the share that the head orders as
           the thoughts do (concordance: Harrell's C, (Somers' D + 1) / 2) fell by over MIN_CHANGE. Equal sub-scores do
           not count, so thoughts that give many videos full marks are no sign
faulty     the share of thoughts that were cut or have no readable sub-scores rose by over MIN_CHANGE

The last two must also change by MIN_ERRORS standard errors: of U-statistics, and of two shares after Agresti and
Caffo (2000). Chance passes four once in 30,000 checks. Signs are no proof: other prompts change rewards as well.
"""

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev

import numpy as np

from descore.answers import JUDGEMENT_KEY, LARGEST_OVERALL, extract_judgement, parse_score
from scoring.source import RewardScale
from scoring.types import Outcome, ScoredVideo

WINDOW, MIN_VIDEOS, CHECK_EVERY = 200, 50, 25
MAX_RUNS = 16
"""Kept; the one that was silent for longest is forgotten."""
MAX_SHIFT, MIN_SPREAD, MIN_CHANGE, MIN_ERRORS = 2.0, 0.25, 0.05, 4.0
MIN_DIFFERENT, MAX_COMPARED = 20, 2000
"""Videos with other sub-scores than most, for an agreement; and videos that are compared in pairs, evenly spaced."""
Seen = tuple[float, float, float]
"""Of a video: the head's own reward, the mean of its sub-scores (NaN without any), the share of faulty thoughts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """Of `num_videos`: mean and standard deviation of the rewards, and shares; a standard error of `agreement`."""

    num_videos: int
    mean: float
    std: float
    agreement: float | None
    agreement_error: float | None
    faulty: float


def observe(video: ScoredVideo) -> Seen:
    """What is kept of a video. One that was scored without a thought is not faulty."""
    thoughts = video.thoughts or (video,)
    faulty = fmean(each.num_tokens > 0 and not (each.is_finished and _read_scores(each.cot)) for each in thoughts)
    scores = _read_scores(video.cot)
    return video.reward, fmean(scores) if scores else math.nan, faulty


def _read_scores(cot: str) -> list[float]:
    scores = (extract_judgement(cot) or {}).get(JUDGEMENT_KEY)
    parsed = map(parse_score, scores.values() if isinstance(scores, dict) else ())
    return [score for score in parsed if isinstance(score, int | float) and abs(score) < LARGEST_OVERALL]


def measure(videos: Sequence[Seen]) -> Figures:
    """Of at least one video."""
    rewards, sub_scores, faulty = zip(*videos, strict=True)
    std = stdev(rewards) if len(videos) > 1 else 0.0
    agreement = compute_agreement(np.array(rewards), np.array(sub_scores))
    return Figures(len(videos), fmean(rewards), std, *agreement, fmean(faulty))


def compute_agreement(rewards: np.ndarray, sub_scores: np.ndarray) -> tuple[float | None, float | None]:
    """Concordance, equal rewards counting half, and its linearised standard error; None without enough to compare."""
    is_known = np.isfinite(sub_scores)
    step = max(1, math.ceil(is_known.sum() / MAX_COMPARED))
    rewards, sub_scores = rewards[is_known][::step], sub_scores[is_known][::step]
    if len(rewards) - np.unique(sub_scores, return_counts=True)[1].max(initial=0) < MIN_DIFFERENT:
        return None, None
    order, head = (np.sign(values[:, None] - values) for values in (sub_scores, rewards))
    decided = np.abs(order).sum(axis=1)
    right = (decided + (order * head).sum(axis=1)) / 2
    share = right.sum() / decided.sum()
    return float(share), float(2 * np.sqrt(((right - share * decided) ** 2).sum()) / decided.sum())


def find_signs(figures: Figures, scale: RewardScale) -> list[str]:
    """Names of the signs. A scale that an older version kept knows nothing of thoughts."""
    found = {
        "mean": abs(scale.apply(figures.mean)) > MAX_SHIFT,
        "spread": not MIN_SPREAD <= figures.std / scale.std <= 1 / MIN_SPREAD,
    }
    if None not in (figures.agreement, scale.agreement):
        error = math.hypot(figures.agreement_error, scale.agreement_error)
        found["agreement"] = scale.agreement - figures.agreement > max(MIN_CHANGE, MIN_ERRORS * error)
    if scale.faulty is not None:
        sizes = np.array([figures.num_videos, scale.num_videos]) + 2
        now, then = shares = (np.array([figures.faulty, scale.faulty]) * (sizes - 2) + 1) / sizes
        error = np.sqrt((shares * (1 - shares) / sizes).sum())
        found["faulty"] = now - then > max(MIN_CHANGE, MIN_ERRORS * error)
    return [name for name, is_found in found.items() if is_found and figures.num_videos >= MIN_VIDEOS]


def describe(figures: Figures, scale: RewardScale) -> str:
    """The figures in one line, those of the calibration in brackets."""
    line = f"mean {figures.mean:.3f} ({scale.mean:.3f}, {scale.apply(figures.mean):+.2f} sd)"
    for name, title in {
        "std": "spread",
        "agreement": "agreement with sub-scores",
        "faulty": "faulty thoughts",
    }.items():
        now, then = ("-" if (value := getattr(of, name)) is None else f"{value:.3f}" for of in (figures, scale))
        line += f", {title} {now} ({then})"
    return line


@dataclass
class _Run:
    videos: deque[Seen] = field(default_factory=lambda: deque(maxlen=WINDOW))
    num_unchecked: int = 0
    signs: list[str] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)


class RunWatch:
    """Watches runs by name, in one thread. `scale`: the calibration; None to keep figures only."""

    def __init__(self, scale: RewardScale | None = None) -> None:
        self.scale = scale
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def add(self, name: str, outcomes: Iterable[Outcome]) -> None:
        """Take what a run got. The first time that the run shows a sign, a warning with the figures is logged."""
        seen = [observe(outcome) for outcome in outcomes if isinstance(outcome, ScoredVideo)]
        if not seen:
            return
        run = self._runs[name] = self._runs.pop(name, None) or _Run()
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        run.videos.extend(seen)
        run.num_unchecked += len(seen)
        if self.scale is None or run.num_unchecked < CHECK_EVERY:
            return
        figures = measure(run.videos)
        run.signs, run.num_unchecked = find_signs(figures, self.scale), 0
        if not run.warned.issuperset(run.signs):
            run.warned.update(run.signs)
            text = "run %s: signs of reward hacking (%s) in its last %d videos: %s"
            logger.warning(text, name, ", ".join(run.signs), len(run.videos), describe(figures, self.scale))

    def read(self) -> dict[str, dict[str, float | None]]:
        """Figures and number of signs by run; the calibration's as those of the run `(calibration)`."""
        figures = {name: asdict(measure(run.videos)) | {"signs": len(run.signs)} for name, run in self._runs.items()}
        known = {name: getattr(self.scale, name) for name in Figures.__annotations__} if self.scale else None
        return figures | ({"(calibration)": known} if known else {})
