"""Reading the file of results: accuracies of arms as arrays over seeds and pairs, curves over steps."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evidence.intervals import Interval, estimate_accuracy, estimate_difference

SETS = ("in_domain", "new_combinations", "new_rendering")


class Results:
    """One file of results; see collecting.py for what it holds. An arm is read `own`, `masked` or `text`."""

    def __init__(self, content: dict) -> None:
        self.content = content
        self.scores = {(s["arm"], s["read"], s["set"], s["seed"]): s for s in content["scores"]}
        self.curves = {(c["run"], c["metric"], c["seed"]): c["values"] for c in content["curves"]}

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Raises ValueError when the file does not hold results."""
        content = json.loads(path.read_text())
        missing = [key for key in ("size", "jobs", "scores", "curves") if key not in content]
        if missing:
            raise ValueError(f"{path} holds no {', '.join(missing)}: name a file that run_evidence.py wrote")
        return cls(content)

    def seeds(self, arm: str, read: str, sets: Sequence[str] = SETS) -> list[int]:
        """Seeds of which every set was scored."""
        found = [{seed for a, r, s, seed in self.scores if (a, r, s) == (arm, read, name)} for name in sets]
        return sorted(set.intersection(*found)) if found else []

    def correct(self, arm: str, read: str, sets: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """bool [seeds, pairs]: the pairs with a preference of all `sets`, in order."""
        return np.array(
            [[c == "1" for name in sets for c in self.scores[arm, read, name, seed]["correct"]] for seed in seeds]
        )

    def accuracy(self, arm: str, read: str, sets: Sequence[str] = SETS) -> Interval | None:
        """Without ties, over all seeds; None when nothing was scored."""
        seeds = self.seeds(arm, read, sets)
        return estimate_accuracy(self.correct(arm, read, sets, seeds)) if seeds else None

    def difference(
        self, arm: tuple[str, str], reference: tuple[str, str], sets: Sequence[str] = SETS
    ) -> Interval | None:
        """Accuracy of one (arm, read) minus that of another over the seeds that both have; None when there is none.

        Raises ValueError when the two were scored on different pairs.
        """
        seeds = [seed for seed in self.seeds(*arm, sets) if seed in self.seeds(*reference, sets)]
        for seed in seeds:
            for name in sets:
                if self.scores[(*arm, name, seed)]["pairs"] != self.scores[(*reference, name, seed)]["pairs"]:
                    raise ValueError(f"{arm} and {reference} were scored on different pairs of {name}")
        if not seeds:
            return None
        return estimate_difference(self.correct(*arm, sets, seeds), self.correct(*reference, sets, seeds))

    def mean(self, field: str, arm: str, read: str, sets: Sequence[str] = SETS) -> float | None:
        """Mean of a number of the score records, such as `with_ties`, over seeds and sets; None when it is missing."""
        seeds = self.seeds(arm, read, sets)
        values = [self.scores[arm, read, name, seed][field] for name in sets for seed in seeds]
        return None if not values or None in values else float(np.mean(values))

    def curve(self, run: str, metric: str, seed: int) -> np.ndarray:
        """float [steps], NaN where a step has no value; empty when the run was not logged."""
        values = self.curves.get((run, metric, seed), [])
        return np.array([np.nan if value is None else value for value in values])

    def runs(self, run: str, metric: str) -> list[int]:
        """Seeds of which there is a curve."""
        return sorted(seed for r, m, seed in self.curves if (r, m) == (run, metric))

    def training_seconds(self, run: str) -> list[float]:
        """Of each seed: seconds of all training steps, without starting and saving."""
        return [float(np.nansum(self.curve(run, "seconds", seed))) for seed in self.runs(run, "seconds")]
