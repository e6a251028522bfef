"""What a benchmark run found: a CSV with the rewards in it, a JSON with everything counted, a table to read."""

import csv
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from scoring.accuracy import compute_model_table, compute_pair_accuracy
from scoring.bench_csv import Bench, iterate_rows, read_columns
from scoring.journal import Journal
from scoring.scale import RewardScale

PAIR_COLUMNS = ("Reward_A", "Reward_B", "CoT_A", "CoT_B")
SINGLE_COLUMNS = ("Reward", "CoT")
MAIN_LABELS = ("Overall", "GSB_overall")
NOTE_WIDTH = 119
ACCURACY_COLUMNS = (
    "label", "accuracy without ties", "with ties, calibrated", "tie up to", "one at a time", "pairs", "unscored",
)  # fmt: skip
ACCURACY_NOTE = (
    "95% bootstrap intervals; chance without ties is 0.5. With ties: margins up to the one named count as a tie, "
    "chosen for the best accuracy; one at a time: the sweep behind published tables. Pairs: with a preference + ties."
)


def added_columns(bench: Bench) -> tuple[str, ...]:
    """Columns that `write_csv` adds."""
    return PAIR_COLUMNS if bench.is_paired else SINGLE_COLUMNS


def write_csv(path: Path, bench: Bench, journal: Journal, *, scale: RewardScale | None = None) -> None:
    """The benchmark's own rows with rewards (on `scale`) and chains of thought; empty cells where there is none."""
    with _replacing(path) as file:
        writer = csv.DictWriter(file, fieldnames=[*read_columns(bench.path), *added_columns(bench)])
        writer.writeheader()
        for row, source in zip(bench.rows, iterate_rows(bench.path), strict=True):
            scored = [journal.read(item) if item in journal.rewards else None for item in row.item_ids]
            rewards = ["" if video is None else repr(_on_scale(video.reward, scale)) for video in scored]
            cots = ["" if video is None else video.cot for video in scored]
            writer.writerow(source.cells | dict(zip(added_columns(bench), rewards + cots, strict=True)))


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


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, for the console and for the page; `note` says how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def format(self) -> list[str]:
        """Lines of text, the first column aligned to the left and the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
            for cells in (tuple(zip(line, widths, strict=True)) for line in (self.columns, *self.rows))
        ]
        return lines + (["", *textwrap.wrap(self.note, NOTE_WIDTH)] if self.note else [])


def choose_main_label(labels: Iterable[str]) -> str | None:
    """The label by which generator models are shown, where a file has it; else its first."""
    labels = tuple(labels)
    return next((name for name in MAIN_LABELS if name in labels), next(iter(labels), None))


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = [
        f"{summary['num_rows']} rows, {summary['num_videos']} videos: {summary['num_scored']} scored, "
        f"{len(summary['failures'])} failed, {summary['num_cut']} thoughts cut at the length limit"
    ]
    if summary["mean_reward"] is not None:
        unit = describe_scale(summary["scale"])
        lines.append(f"mean reward {summary['mean_reward']:.4f}" + (f", in {unit}" if unit else ""))
    labels = summary["labels"]
    if labels:
        lines += ["", *build_accuracy_table(labels).format()]
    main = choose_main_label(labels)
    if main is not None and labels[main]["models"]:
        lines += ["", *build_model_table(main, labels[main]["models"]).format()]
    return "\n".join(lines)


def describe_scale(scale: Mapping[str, Any] | None) -> str | None:
    """What rewards are given in; None for the head's own."""
    if scale is None:
        return None
    unit = f"{scale['num_videos']} videos of {scale['data']}, {scale['mean']:.4f} +- {scale['std']:.4f}"
    return f"standard deviations from the mean of {unit}"


def build_accuracy_table(labels: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each label column."""
    rows = tuple(
        (
            name,
            _show_interval(values["without_ties"]),
            _show_interval(values["with_ties"]),
            "none" if values["threshold"] is None else f"{values['threshold']:.4f}",
            _show(values["sweep"]),
            f"{values['num_decided']} + {values['num_ties']}",
            str(values["num_unscored"]),
        )
        for name, values in labels.items()
    )
    return Table("Agreement with people", ACCURACY_COLUMNS, rows, ACCURACY_NOTE)


def build_model_table(label: str, models: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each generator model, under one label."""
    shares = ("accuracy", "human_win_rate", "reward_win_rate")
    rows = tuple((row["model"], str(row["num_decided"]), *(_show(row[name]) for name in shares)) for row in models)
    return Table("Generator models", (label, "pairs", "accuracy", "people prefer it", "the reward does"), rows)


def _show_interval(estimate: Mapping[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _show(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
