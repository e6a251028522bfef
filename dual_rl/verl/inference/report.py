"""What a benchmark run found: a CSV with the rewards in it, a JSON with everything counted, a table to read."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TextIO

from verl.inference.accuracy import Estimate, ModelRow, compute_model_table, compute_pair_accuracy
from verl.inference.bench_csv import Bench, iterate_cells, read_columns
from verl.inference.journal import Journal
from verl.inference.scale import RewardScale

PAIR_COLUMNS = ("Reward_A", "Reward_B", "CoT_A", "CoT_B")
SINGLE_COLUMNS = ("Reward", "CoT")
MAIN_LABELS = ("Overall", "GSB_overall")
"""The label by which generator models are shown, where a file has it; else its first."""


def added_columns(bench: Bench) -> tuple[str, ...]:
    """Columns that `write_csv` adds."""
    return PAIR_COLUMNS if bench.is_paired else SINGLE_COLUMNS


def write_csv(path: Path, bench: Bench, journal: Journal, *, scale: RewardScale | None = None) -> None:
    """The benchmark's own rows with rewards (on `scale`) and chains of thought; empty cells where there is none."""
    with _replacing(path) as file:
        writer = csv.DictWriter(file, fieldnames=[*read_columns(bench.path), *added_columns(bench)])
        writer.writeheader()
        for row, cells in zip(bench.rows, iterate_cells(bench.path), strict=True):
            scored = [journal.read(item) if item in journal.rewards else None for item in row.item_ids]
            rewards = ["" if video is None else repr(_on_scale(video.reward, scale)) for video in scored]
            cots = ["" if video is None else video.cot for video in scored]
            writer.writerow(cells | dict(zip(added_columns(bench), rewards + cots, strict=True)))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Written under another name and renamed: complete or absent."""
    with _replacing(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        yield file
    os.replace(temporary, path)


def _on_scale(reward: float, scale: RewardScale | None) -> float:
    return reward if scale is None else scale.apply(reward)


def summarise(bench: Bench, journal: Journal, *, seed: int, scale: RewardScale | None = None) -> dict[str, object]:
    """Counts, accuracies by label column and by generator model, failures; JSON values. `seed`: of the bootstrap.

    `scale`: what rewards, and so thresholds, are given on; it is named in the result.
    """
    rewards = {name: _on_scale(journal.rewards[name], scale) for name in bench.items if name in journal.rewards}
    cut = sum(not journal.read(name).is_finished for name in bench.items if name in journal.rewards)
    return {
        "num_rows": len(bench.rows),
        "num_duplicate_rows": bench.num_duplicate_rows,
        "num_videos": len(bench.items),
        "num_scored": len(rewards),
        "num_cut": cut,
        "scale": None if scale is None else asdict(scale),
        "mean_reward": fmean(rewards.values()) if rewards else None,
        "labels": {
            name: _summarise_label(bench, rewards, column, seed=seed)
            for column, name in enumerate(bench.label_columns)
        },
        "failures": [{"video": bench.items[name].video, "error": error} for name, error in journal.failures.items()],
    }


def _summarise_label(bench: Bench, rewards: Mapping[str, float], column: int, *, seed: int) -> dict[str, object]:
    labelled = [row for row in bench.rows if row.labels[column] is not None]
    scored = [row for row in labelled if all(item in rewards for item in row.item_ids)]
    margins = [rewards[row.item_ids[0]] - rewards[row.item_ids[1]] for row in scored]
    labels = [row.labels[column] for row in scored]
    named = [place for place, row in enumerate(scored) if row.models is not None]
    models = compute_model_table(
        [margins[place] for place in named],
        [labels[place] for place in named],
        [scored[place].models for place in named],
    )
    return {
        **asdict(compute_pair_accuracy(margins, labels, seed=seed)),
        "num_unlabelled": len(bench.rows) - len(labelled),
        "num_unscored": len(labelled) - len(scored),
        "models": [asdict(model) for model in models],
    }


def format_table(summary: Mapping[str, object]) -> str:
    """The summary as text."""
    lines = [
        f"{summary['num_rows']} rows, {summary['num_videos']} videos: {summary['num_scored']} scored, "
        f"{len(summary['failures'])} failed, {summary['num_cut']} thoughts cut at the length limit"
    ]
    if summary["mean_reward"] is not None:
        lines.append(f"mean reward {summary['mean_reward']:.4f}{_describe_scale(summary['scale'])}")
    labels = summary["labels"]
    if labels:
        lines += ["", *_accuracy_lines(labels), ""]
        lines.append(
            "95% bootstrap intervals; chance without ties is 0.5. With ties: margins up to the one named count as"
        )
        lines.append("a tie, chosen for the best accuracy; one at a time: the sweep behind published tables.")
    main = next((name for name in MAIN_LABELS if name in labels), next(iter(labels), None))
    if main is not None and labels[main]["models"]:
        lines += ["", *_model_lines(main, [ModelRow(**model) for model in labels[main]["models"]])]
    return "\n".join(lines)


def _describe_scale(scale: Mapping[str, object] | None) -> str:
    if scale is None:
        return ""
    unit = f"{scale['num_videos']} videos of {scale['data']}, {scale['mean']:.4f} +- {scale['std']:.4f}"
    return f", in standard deviations from the mean of {unit}"


def _accuracy_lines(labels: Mapping[str, Mapping[str, object]]) -> list[str]:
    titles = ("accuracy without ties", "with ties, calibrated", "tie up to", "one at a time", "pairs", "unscored")
    width = max(map(len, ("label", *labels)))
    lines = [f"{'label':<{width}}  {titles[0]:>22}  {titles[1]:>22}  {titles[2]:>9}  {titles[3]:>13}"
             f"  {titles[4]:>11}  {titles[5]:>8}"]  # fmt: skip
    for name, values in labels.items():
        sweep = "-" if values["sweep"] is None else f"{values['sweep']:.3f}"
        threshold = "none" if values["threshold"] is None else f"{values['threshold']:.4f}"
        pairs = f"{values['num_decided']} + {values['num_ties']}"
        lines.append(
            f"{name:<{width}}  {_interval(values['without_ties']):>22}  {_interval(values['with_ties']):>22}"
            f"  {threshold:>9}  {sweep:>13}  {pairs:>11}  {values['num_unscored']:>8}"
        )
    return [*lines, "pairs: with a preference + ties"]


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    values = Estimate(**estimate)
    return f"{values.value:.3f} [{values.low:.3f}, {values.high:.3f}]"


def _model_lines(label: str, models: Sequence[ModelRow]) -> list[str]:
    width = max(len(label), *(len(model.model) for model in models))
    lines = [f"{label:<{width}}  pairs  accuracy  people prefer it  the reward does"]
    for model in models:
        shares = (model.accuracy, model.human_win_rate, model.reward_win_rate)
        accuracy, human, reward = ("-" if share is None else f"{share:.3f}" for share in shares)
        lines.append(f"{model.model:<{width}}  {model.num_decided:>5}  {accuracy:>8}  {human:>16}  {reward:>15}")
    return lines
