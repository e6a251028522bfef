"""What a benchmark run found: a CSV with the rewards in it, a JSON with all counts, and tables to read."""

import csv
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from scoring.accuracy import Estimate, compute_model_table, compute_pair_accuracy
from scoring.bench_csv import Bench, BenchRow
from scoring.journal import Journal
from scoring.source import RewardScale, apply_scale_to_video

ADDED_COLUMNS = ("Reward", "CoT", "StandardError")
"""The last only where rewards are means of several thoughts."""
MAIN_LABELS = ("Overall", "GSB_overall")
NOTE_WIDTH = 119
NUM_FAILURES_SHOWN = 10
ACCURACY_COLUMNS = (
    "label", "accuracy without ties", "with ties, calibrated", "tie up to", "one at a time", "pairs", "unscored",
)  # fmt: skip
ACCURACY_NOTE = (
    "95% bootstrap intervals; chance without ties is 0.5. With ties: margins up to the one named count as a tie, "
    "chosen for the best accuracy; one at a time: the sweep behind published tables. Pairs: with a preference + ties."
)


def added_columns(bench: Bench, *, has_errors: bool = False) -> tuple[str, ...]:
    """Columns that `write_csv` adds."""
    names = ADDED_COLUMNS if has_errors else ADDED_COLUMNS[:-1]
    return tuple(f"{name}{side}" for name in names for side in (("_A", "_B") if bench.is_paired else ("",)))


def write_csv(
    path: Path, bench: Bench, journal: Journal, *, scale: RewardScale | None = None, has_errors: bool = False
) -> None:
    """The benchmark's rows with rewards (on `scale`) and chains of thought, complete or absent; blank without one.

    `has_errors`: with columns of standard errors.
    """
    columns = added_columns(bench, has_errors=has_errors)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*bench.columns, *columns])
        writer.writeheader()
        for row in bench.rows:
            found = [journal.read(item) if item in journal.rewards else None for item in row.item_ids]
            scored = [None if video is None else apply_scale_to_video(video, scale) for video in found]
            cells = ["" if video is None else repr(video.reward) for video in scored]
            cells += ["" if video is None else video.cot for video in scored]
            errors = [None if video is None else video.standard_error for video in scored] if has_errors else []
            cells += ["" if error is None else repr(error) for error in errors]
            writer.writerow(row.cells | dict(zip(columns, cells, strict=True)))
    os.replace(temporary, path)


def summarise(bench: Bench, journal: Journal, *, seed: int, scale: RewardScale | None = None) -> dict[str, object]:
    """Counts, accuracies by label column and by generator model, failures; JSON values. `seed`: of the bootstrap.

    `scale`: of the rewards, and so of the thresholds; the result names it.
    """
    scored = (apply_scale_to_video(journal.read(name), scale) for name in bench.items if name in journal.rewards)
    videos = [replace(video, cot="", thoughts=()) for video in scored]
    rewards = {video.name: video.reward for video in videos}
    errors = [video.standard_error for video in videos if video.standard_error is not None]

    def count(names: Iterable[str]) -> int:
        """Distinct videos: some have two items where thinking depends on the margin."""
        return len({(bench.items[name].video, bench.items[name].problem) for name in names})

    return {
        "num_rows": len(bench.rows),
        "num_duplicate_rows": bench.num_duplicate_rows,
        "num_videos": count(bench.items),
        "num_scored": count(rewards),
        "num_cut": sum(not video.is_finished for video in videos),
        "scale": None if scale is None else asdict(scale),
        "mean_reward": fmean(rewards.values()) if rewards else None,
        **({"mean_standard_error": fmean(errors)} if errors else {}),
        "labels": {
            name: _summarise_label(bench, rewards, column, seed=seed)
            for column, name in enumerate(bench.label_columns)
        },
        "failures": [
            {"video": bench.items[name].video, "error": error}
            for name, error in journal.failures.items()
            if name in bench.items
        ],
    }


def _summarise_label(bench: Bench, rewards: Mapping[str, float], column: int, *, seed: int) -> dict[str, object]:
    labelled = [row for row in bench.rows if row.labels[column] is not None]
    scored = [row for row in labelled if all(item in rewards for item in row.item_ids)]
    named = [row for row in scored if row.models is not None]

    def judge(rows: Sequence[BenchRow]) -> tuple[list[float], list[int | None]]:
        """Margins and labels."""
        return [row.compute_margin(rewards) for row in rows], [row.labels[column] for row in rows]

    models = compute_model_table(*judge(named), [row.models for row in named])
    return {
        **asdict(compute_pair_accuracy(*judge(scored), seed=seed)),
        "num_unlabelled": len(bench.rows) - len(labelled),
        "num_unscored": len(labelled) - len(scored),
        "models": [asdict(row) for row in models],
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
            "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
            for first, *others in (self.columns, *self.rows)
        ]
        return lines + (["", *textwrap.wrap(self.note, NOTE_WIDTH)] if self.note else [])


def choose_main_label(labels: Iterable[str]) -> str | None:
    """The label that generator models are shown for: an overall one if there is one, otherwise the first."""
    labels = tuple(labels)
    return next((name for name in MAIN_LABELS if name in labels), next(iter(labels), None))


def format_result(result: Mapping[str, Any]) -> str:
    """The summary for the console, failures first."""
    failures, labels = result["failures"], result["labels"]
    lines = [f"failed: {failure['error']}" for failure in failures[:NUM_FAILURES_SHOWN]]
    if len(failures) > NUM_FAILURES_SHOWN:
        lines.append(f"... and {len(failures) - NUM_FAILURES_SHOWN} more, see the JSON")
    lines.append(
        f"{result['num_rows']} rows, {result['num_videos']} videos: {result['num_scored']} scored, "
        f"{len(failures)} failed, {result['num_cut']} with a thought cut at the length limit"
    )
    if result["mean_reward"] is not None:
        unit = describe_scale(result["scale"])
        lines.append(f"mean reward {result['mean_reward']:.4f}" + (f", in {unit}" if unit else ""))
    if "mean_standard_error" in result:
        lines.append(f"standard error of a reward: {result['mean_standard_error']:.4f} on average")
    if rule := result.get("thinking"):
        lines.append(
            f"{rule['num_thought']} of {result['num_videos']} videos thought, those of pairs whose rewards without a "
            f"thought differ by at most {rule['margin']:.4f}"
        )
    if watch := result.get("watch"):
        lines.append(f"signs of reward hacking: {', '.join(watch['signs']) or 'none'}; {watch['summary']}")
    main = choose_main_label(labels)
    if main is not None:
        lines += ["", *build_accuracy_table(labels).format()]
        if labels[main]["models"]:
            lines += ["", *build_model_table(main, labels[main]["models"]).format()]
    return "\n".join(lines)


def describe_scale(scale: Mapping[str, Any] | None) -> str | None:
    """The unit of rewards; None for the head's own."""
    if scale is None:
        return None
    unit = f"{scale['num_videos']} videos of {scale['data']}, {scale['mean']:.4f} +- {scale['std']:.4f}"
    return f"standard deviations from the mean of {unit}"


def build_accuracy_table(labels: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per label column."""
    rows = tuple(
        (
            name,
            *("-" if values[key] is None else str(Estimate(**values[key])) for key in ("without_ties", "with_ties")),
            "none" if values["threshold"] is None else f"{values['threshold']:.4f}",
            _show(values["sweep"]),
            f"{values['num_decided']} + {values['num_ties']}",
            str(values["num_unscored"]),
        )
        for name, values in labels.items()
    )
    return Table("Agreement with people", ACCURACY_COLUMNS, rows, ACCURACY_NOTE)


def build_model_table(label: str, models: Sequence[Mapping[str, Any]]) -> Table:
    """A row per generator model, for one label."""
    shares = ("accuracy", "human_win_rate", "reward_win_rate")
    rows = tuple((row["model"], str(row["num_decided"]), *(_show(row[name]) for name in shares)) for row in models)
    return Table("Generator models", (label, "pairs", "accuracy", "people prefer it", "the reward does"), rows)


def _show(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
