"""Draws what best-of-N selection gains: `python figure/draw_best_of_n.py` reads best_of_n.csv, writes best_of_n.png.

best_of_n.csv has a row per clip: model, folder, reward, true_score. It comes from `--collect`, which joins the
ranking of dual_rl/examples/best_of_n.py with the truth of cold_start/datasets/make_best_of_n.py:

    python figure/draw_best_of_n.py --collect clips/truth.csv "stage 1=stage1.csv" "stage 2=stage2.csv"
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from math import comb
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
DATA, PICTURE = HERE / "best_of_n.csv", HERE / "best_of_n.png"
COLUMNS = ("model", "folder", "reward", "true_score")
NUMBERS = (1, 2, 4, 8)
PERFECT = "a perfect judge"
STYLES = (("o", "-", "#1d4e89"), ("s", "--", "#f0b64c"), ("^", ":", "#1b2430"))


def collect(truth: Path, rankings: list[str]) -> None:
    """Write best_of_n.csv. `rankings`: NAME=CSV each."""
    with truth.open(newline="") as file:
        scores = {(row["folder"], row["video"]): row["true_score"] for row in csv.DictReader(file)}
    with DATA.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for ranking in rankings:
            name, _, path = ranking.partition("=")
            with open(path, newline="") as ranked:
                for row in csv.DictReader(ranked):
                    clip = (row["folder"], Path(row["video"]).name)
                    writer.writerow([name, row["folder"], f"{float(row['reward']):.5f}", scores[clip]])


def compute_expected_best(rewards: Sequence[float], values: Sequence[float], *, n: int) -> float:
    """Mean of `values` at the highest reward over all ways to draw `n` of the clips; equal rewards share equally.

    Of K clips in ascending order of reward, the i-th (from 0) is the best of comb(i, n - 1) of the comb(K, n) draws.

    Example: rewards (1, 2, 3), values (0, 0, 1), n = 2: the third clip is the best of two of the three draws: 2/3.
    """
    total, start = 0.0, 0
    for _, equals in groupby(sorted(zip(rewards, values, strict=True)), key=itemgetter(0)):
        of_equals = [value for _, value in equals]
        num_draws = sum(comb(index, n - 1) for index in range(start, start + len(of_equals)))
        total += num_draws * fmean(of_equals)
        start += len(of_equals)
    return total / comb(len(rewards), n)


def compute_curves() -> dict[str, list[tuple[int, float, float]]]:
    """By model: N, mean true score of the chosen clip over prompts, and its standard error."""
    clips: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with DATA.open(newline="") as file:
        for row in csv.DictReader(file):
            reward, truth = float(row["reward"]), float(row["true_score"])
            clips[row["model"]][row["folder"]].append((reward, truth))
    first, *others = clips
    clips[PERFECT] = {folder: [(truth, truth) for _, truth in group] for folder, group in clips[first].items()}
    curves = {}
    for model in (first, PERFECT, *others):
        curves[model] = []
        for n in NUMBERS:
            means = [compute_expected_best(*zip(*group, strict=True), n=n) for group in clips[model].values()]
            curves[model].append((n, fmean(means), stdev(means) / len(means) ** 0.5))
    return curves


def draw(curves: dict[str, list[tuple[int, float, float]]]) -> None:
    """One line per model, with standard errors over prompts."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    ax = figure.subplots()
    for (model, points), (marker, line, color) in zip(curves.items(), STYLES, strict=False):
        numbers, means, errors = zip(*points, strict=True)
        ax.errorbar(numbers, means, errors, marker=marker, linestyle=line, color=color, capsize=3, label=model)
    ax.set_xscale("log", base=2)
    ax.set_xticks(NUMBERS, [str(n) for n in NUMBERS])
    ax.set_xlabel("N: clips to choose from")
    ax.set_ylabel("true score of the chosen clip (1 to 5)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(PICTURE, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs="+", metavar="CSV", help="truth.csv, then NAME=ranking.csv for each model")
    options = parser.parse_args()
    if options.collect:
        collect(Path(options.collect[0]), options.collect[1:])
    curves = compute_curves()
    draw(curves)
    for model, points in curves.items():
        shown = "  ".join(f"N={n}: {mean:.3f} +- {error:.3f}" for n, mean, error in points)
        sys.stdout.write(f"{model:<16} {shown}\n")


if __name__ == "__main__":
    main()
