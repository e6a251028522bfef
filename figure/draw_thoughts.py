"""Draws what more thoughts, and fewer, are worth: `python figure/draw_thoughts.py` reads thoughts.json, writes a PNG.

thoughts.json comes from `--collect` and the journals of three runs of dual_rl/inference.sh: two on one benchmark, with
--num_thoughts 16 and with --calibrate --think_agreement 0.9, and one on its first 40 rows with --num_thoughts 128:

    python figure/draw_thoughts.py --collect bench.csv k.rewards.jsonl greedy.rewards.jsonl many.rewards.jsonl

An interval is the mean of k thoughts plus and minus Student's t times its standard error. It covers if it contains the
mean of the clip's other thoughts.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
DATA, PICTURE = HERE / "thoughts.json", HERE / "thoughts.png"
STUDENT_T = {2: 12.706, 4: 3.182, 8: 2.365}
"""Of a two-sided 95% interval with k - 1 degrees of freedom."""
NUMBERS = (1, *STUDENT_T)
NUM_STEPS = 20
BLUE, AMBER = "#1d4e89", "#f0b64c"


def measure_coverage(rewards: np.ndarray, k: int) -> tuple[float, float]:
    """Share of intervals of k thoughts that cover, and its standard error over clips; `rewards` [clips, thoughts]."""
    num_clips, num_thoughts = rewards.shape
    groups = rewards[:, : num_thoughts // k * k].reshape(num_clips, -1, k)
    others = (rewards.sum(axis=1, keepdims=True) - groups.sum(axis=2)) / (num_thoughts - k)
    half = STUDENT_T[k] * groups.std(axis=2, ddof=1) / k**0.5
    shares = (np.abs(groups.mean(axis=2) - others) <= half).mean(axis=1)
    return float(shares.mean()), float(shares.std(ddof=1) / num_clips**0.5)


def sweep_thinking(masked: np.ndarray, thought: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float]]:
    """Share of pairs that think, of verdicts as if all did, and accuracy: those closest without a thought think."""
    order, decided, points = np.argsort(np.abs(masked), kind="stable"), labels != 0, []
    for num_thinking in np.linspace(0, len(order), NUM_STEPS + 1).astype(int):
        margins = masked.copy()
        margins[order[:num_thinking]] = thought[order[:num_thinking]]
        accuracy = (margins * labels > 0)[decided].mean()
        points.append((num_thinking / len(order), (np.sign(margins) == np.sign(thought)).mean(), accuracy))
    return [tuple(round(float(value), 4) for value in point) for point in points]


def collect(bench_path: str, *journals: str) -> None:
    """Write thoughts.json."""
    sys.path.insert(0, str(HERE.parent / "dual_rl"))
    from scoring.bench_csv import read_bench

    several, greedy, many = (
        [json.loads(line) for line in Path(path).read_bytes().splitlines()[1:]] for path in journals
    )
    rows = [row for row in read_bench(bench_path, "tabench").rows if row.labels[0] is not None]
    labels, one = np.array([row.labels[0] for row in rows]), {entry["name"]: entry["reward"] for entry in greedy}
    names = np.array([row.item_ids for row in rows])
    drawn = {entry["name"]: [thought["reward"] for thought in entry["thoughts"]] for entry in several}
    differences = np.array([np.subtract(drawn[a], drawn[b]) for a, b in names])  # [pairs, thoughts]
    masked, thought = (np.array([one[a + suffix] - one[b + suffix] for a, b in names]) for suffix in ("-masked", ""))
    accuracies = {}
    for k in NUMBERS:
        means = differences.reshape(len(rows), -1, k).mean(axis=2)
        accuracies[k] = round(float((means * labels[:, None] > 0)[labels != 0].mean()), 4)
    rewards = np.array([[thought["reward"] for thought in entry["thoughts"]] for entry in many])
    result = {
        "pairs": int(np.count_nonzero(labels)),
        "thoughts": differences.shape[1],
        "accuracy": accuracies,
        "accuracy_of_the_greedy_thought": round(float((thought * labels > 0)[labels != 0].mean()), 4),
        "coverage": {"clips": rewards.shape[0], "thoughts": rewards.shape[1]}
        | {k: [round(value, 4) for value in measure_coverage(rewards, k)] for k in STUDENT_T},
        "thinking": sweep_thinking(masked, thought, labels),
    }
    DATA.write_text(json.dumps(result) + "\n")


def draw(result: dict) -> None:
    """Accuracy over thoughts, and over the share of pairs that think."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    values = np.array([result["accuracy"][str(k)] for k in NUMBERS])
    errors = 1.96 * np.sqrt(values * (1 - values) / result["pairs"])
    left.errorbar(NUMBERS, values, errors, marker="o", color=BLUE, capsize=3, label="drawn")
    left.axhline(result["accuracy_of_the_greedy_thought"], color=AMBER, linestyle="--", label="one greedy thought")
    left.set_xscale("log", base=2)
    left.set(xlabel="thoughts per video", ylabel=f"accuracy, {result['pairs']} pairs", ylim=(0.4, 1))
    left.set_xticks(NUMBERS, [str(k) for k in NUMBERS])
    shares, agreements, accuracies = zip(*result["thinking"], strict=True)
    right.plot(shares, agreements, color=AMBER, linestyle="--", label="verdict of always thinking")
    right.plot(shares, accuracies, color=BLUE, label="accuracy")
    right.axhline(0.5, color="gray", linewidth=0.8)
    right.set(xlabel="share of pairs that think, the closest first", ylim=(0.4, 1.02))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="upper left")
    figure.savefig(PICTURE, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", nargs=4, metavar="FILE", help="benchmark CSV (tabench), and the journals")
    options = parser.parse_args()
    if options.collect:
        collect(*options.collect)
    result = json.loads(DATA.read_text())
    draw(result)
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in result.items()))


if __name__ == "__main__":
    main()
