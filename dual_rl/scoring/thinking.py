"""Thinking only where it matters: pairs are first judged by rewards without a thought, and think if these are close.

How close is calibrated: on a validation set, the pairs that do not think must get the verdict of their thoughts often
enough. Rewards without a thought and after one are not on the same scale: a pair is judged by two of the same kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from scoring.accuracy import compute_pair_accuracy
from scoring.bench_csv import Bench, BenchRow
from scoring.source import Calibration

CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class ThinkMargin(Calibration):
    """Pairs think if their rewards without a thought differ by at most `margin`.

    On `num_pairs` pairs that gives the verdict of always thinking for a share `agreement`, and a share
    `thinking` of the pairs thinks. `accuracy`: of rewards without a thought.
    """

    FILE: ClassVar[str] = "think_margin.json"

    margin: float
    agreement: float
    share_thinking: float
    accuracy: float
    num_pairs: int


def choose_margin(
    masked: Sequence[float], thought: Sequence[float], *, least_agreement: float
) -> tuple[float, float, float]:
    """`margin`, `agreement` and `share_thinking` of `ThinkMargin`; the least margin that agrees often enough.

    `masked`, `thought`: for each pair, at least one, the reward of A minus that of B without and after thoughts.
    Raises ValueError where even the pair with the largest margin would have to think.

    Example: margins (3, 2, 1) against (1, -1, 1) and an agreement of 0.6: none has to think, 2 of 3 verdicts agree.
    """
    masked, thought = np.asarray(masked, dtype=np.float64), np.asarray(thought, dtype=np.float64)
    order, num_pairs = np.argsort(-np.abs(masked), kind="stable"), len(masked)
    magnitudes = np.abs(masked)[order]
    num_other = np.cumsum((np.sign(masked) != np.sign(thought))[order])  # verdicts, if so many pairs do not think
    is_end = np.append(np.diff(magnitudes) < 0, True)  # of a group of equal magnitudes
    fitting = np.flatnonzero(is_end & (num_other <= (1 - least_agreement) * num_pairs + 1e-9))
    if not len(fitting):
        raise ValueError(
            f"no margin of rewards without a thought keeps {least_agreement:g} of the verdicts. Lower think_agreement."
        )
    num_sure = int(fitting[-1]) + 1
    margin = float(magnitudes[num_sure]) if num_sure < num_pairs else 0.0
    return margin, 1 - int(num_other[num_sure - 1]) / num_pairs, (num_pairs - num_sure) / num_pairs


def calibrate_margin(
    bench: Bench,
    rewards: Mapping[str, float],
    column: int,
    *,
    least_agreement: float,
    **measured: object,
) -> ThinkMargin:
    """The margin for a paired benchmark whose videos have both `rewards`, by the labels of `column`.

    `measured`: as of `Calibration`.

    Raises ValueError where rewards without a thought are no better than chance, or as `choose_margin`.
    """
    pairs = [
        (without.compute_margin(rewards), row.compute_margin(rewards), row.labels[column])
        for row, without in zip(bench.rows, mask_bench(bench).rows, strict=True)
    ]
    pairs = [pair for pair in pairs if None not in pair[:2]]
    labelled = [(masked, label) for masked, _, label in pairs if label is not None]
    accuracy = compute_pair_accuracy(*zip(*labelled, strict=True)).without_ties if labelled else None
    if accuracy is None or accuracy.low <= CHANCE:
        raise ValueError(
            f"without a thought, {accuracy or 'none'} of the pairs of {bench.path} agree with people, no better than "
            "chance: no margin is kept. Always think with this model, or calibrate on more pairs."
        )
    margin, agreement, thinking = choose_margin(
        *([pair[kind] for pair in pairs] for kind in (0, 1)), least_agreement=least_agreement
    )
    found = {"margin": margin, "agreement": agreement, "share_thinking": thinking}
    return ThinkMargin(**found, accuracy=accuracy.value, num_pairs=len(pairs), **measured)


def mask_bench(bench: Bench) -> Bench:
    """The same benchmark with items, of other names, that do not think."""
    tasks = {_masked(name): replace(task, name=_masked(name), num_thoughts=0) for name, task in bench.items.items()}
    rows = [replace(row, item_ids=tuple(map(_masked, row.item_ids))) for row in bench.rows]
    return replace(bench, items=tasks, rows=rows, missing={_masked(name): why for name, why in bench.missing.items()})


def mix_bench(bench: Bench, rewards: Mapping[str, float], margin: float) -> Bench:
    """The benchmark where a pair has the items that think if it is unsure, or both its videos think for others.

    `rewards`: of the items of `mask_bench`; pairs without both do not think.
    """

    def is_unsure(row: BenchRow) -> bool:
        difference = row.compute_margin(rewards)
        return difference is not None and abs(difference) <= margin

    masked = mask_bench(bench)
    both = list(zip(bench.rows, masked.rows, strict=True))
    thinking = {name for row, without in both if is_unsure(without) for name in row.item_ids}
    rows = [row if thinking.issuperset(row.item_ids) else without for row, without in both]
    tasks, names = masked.items | bench.items, dict.fromkeys(name for row in rows for name in row.item_ids)
    return replace(bench, items={name: tasks[name] for name in names}, rows=rows, missing=masked.missing)


def _masked(name: str) -> str:
    return f"{name}-masked"
