"""The page of a benchmark run: its rows with rewards, labels, thoughts and sub-scores, its tables, its charts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from descore.answers import JUDGEMENT_KEY, extract_judgement
from verl.data.scored_sequence import JUDGE_PROMPT
from verl.inference.bench_csv import Bench, BenchRow
from verl.inference.html_page import Item, Page, Row, Table, View, merge_scores, quote_path, relative_path
from verl.inference.journal import Journal
from verl.inference.report import MAIN_LABELS
from verl.inference.report_charts import Bars, Points, build_calibration, build_histogram, sigmoid
from verl.inference.scale import RewardScale

RIGHT, WRONG, TIE, UNLABELLED, UNSCORED = VERDICTS = ("right", "wrong", "tie", "unlabelled", "unscored")
CUT = "cut at the length limit: the reward is read after what there is"
OVERALL_KEY = "overall_score"
MAX_SCORE_CHARACTERS = 80
_BEFORE_PROMPT, _AFTER_PROMPT = JUDGE_PROMPT.format(prompt="\0").split("\0")
Number = float | None


def build_bench_page(path: Path, bench: Bench, journal: Journal, result: Mapping[str, object]) -> Page:
    """The page that will stand at `path`. `result`: what the run writes as JSON; rewards are on the scale it names.

    Probabilities are of the unscaled margin: only that is Bradley-Terry's.
    """
    scale = None if result["scale"] is None else RewardScale(**result["scale"])
    items = tuple(_build_item(path, bench, journal, name, scale=scale) for name in bench.items)
    scores = [read_scores(item.thought) for item in items]
    places = {name: place for place, name in enumerate(bench.items)}
    prompts = {problem: n for n, problem in enumerate(dict.fromkeys(item.problem for item in bench.items.values()))}
    has_models = any(row.models for row in bench.rows)
    margins = [_margin(row, journal.rewards) for row in bench.rows]
    rows = []
    for number, (row, margin) in enumerate(zip(bench.rows, margins, strict=True), start=1):
        of_row = tuple(places[name] for name in row.item_ids)
        rewards = tuple(items[place].reward for place in of_row)
        shown = None if margin is None else rewards[0] - rewards[1]
        lines = merge_scores([scores[place] for place in of_row])
        rows.append(
            Row(
                number=number,
                items=of_row,
                prompt=prompts[bench.items[row.item_ids[0]].problem],
                models=row.models or (),
                summary="" if margin is None else f"margin {shown:+.4f}, P(A is better) {sigmoid(margin):.3f}",
                numbers=(shown, None if shown is None else abs(shown), *rewards) if bench.is_paired else rewards,
                facets=(tuple(dict.fromkeys(row.models or ())),) if has_models else (),
                score_columns=_sides(bench) if lines else (),
                scores=lines,
            )
        )
    return Page(
        title=f"{bench.bench_type}: {os.path.basename(bench.path)}",
        facts=_build_facts(bench, result),
        tables=_build_accuracy_table(result["labels"]),
        failures=tuple(failure["error"] for failure in result["failures"]),
        sides=_sides(bench) if bench.is_paired else ("",),
        sorts=("margin", "|margin|", "reward A", "reward B") if bench.is_paired else ("reward",),
        verdicts=VERDICTS if bench.label_columns else (UNLABELLED, UNSCORED),
        facets=("generator model",) if has_models else (),
        main=next((bench.label_columns.index(name) for name in MAIN_LABELS if name in bench.label_columns), 0),
        views=_build_views(bench, margins, rows, result["labels"]),
        prompts=tuple(map(unwrap_prompt, prompts)),
        items=items,
        rows=tuple(rows),
    )


def judge_row(*, is_scored: bool, margin: Number, label: int | None) -> str:
    """One of VERDICTS. As in the accuracies, equal rewards are wrong about a pair that people decide."""
    if not is_scored:
        return UNSCORED
    if label is None or margin is None:
        return UNLABELLED
    if label == 0:
        return TIE
    return RIGHT if margin * label > 0 else WRONG


def read_scores(thought: str | None) -> dict[str, str]:
    """Dimension -> score as the thought's `<answer>` has it, the overall one last; empty without a judgement."""
    judgement = extract_judgement(thought or "")
    scores = judgement.get(JUDGEMENT_KEY) if judgement else None
    found = dict(scores) if isinstance(scores, dict) else {}
    if judgement and OVERALL_KEY in judgement:
        found["overall"] = judgement[OVERALL_KEY]
    return {name: str(score)[:MAX_SCORE_CHARACTERS] for name, score in found.items()}


def unwrap_prompt(problem: str) -> str:
    """The text that the video was made from, where the built-in judge prompt is around it; else all of it."""
    if problem.startswith(_BEFORE_PROMPT) and problem.endswith(_AFTER_PROMPT):
        return problem[len(_BEFORE_PROMPT) : len(problem) - len(_AFTER_PROMPT)]
    return problem


def _build_item(path: Path, bench: Bench, journal: Journal, name: str, *, scale: RewardScale | None) -> Item:
    video = relative_path(bench.items[name].video, path)
    clip = None if name in bench.missing else quote_path(video)
    if name not in journal.rewards:
        return Item(clip, video, None, None, journal.failures.get(name, "not scored"))
    scored = journal.read(name)
    reward = scored.reward if scale is None else scale.apply(scored.reward)
    return Item(clip, video, reward, scored.cot, "" if scored.is_finished else CUT)


def _margin(row: BenchRow, rewards: Mapping[str, float]) -> Number:
    """Unscaled; None for a single video, or without both rewards."""
    if len(row.item_ids) != 2 or not all(name in rewards for name in row.item_ids):
        return None
    return rewards[row.item_ids[0]] - rewards[row.item_ids[1]]


def _sides(bench: Bench) -> tuple[str, ...]:
    return ("A", "B") if bench.is_paired else ("score",)


def _build_views(
    bench: Bench, margins: Sequence[Number], rows: Sequence[Row], labels: Mapping[str, Mapping]
) -> tuple[View, ...]:
    views = []
    for column, name in enumerate(bench.label_columns or ("",)):
        found = tuple(row.labels[column] if bench.label_columns else None for row in bench.rows)
        verdicts = tuple(
            judge_row(is_scored=None not in row.numbers, margin=margin, label=label)
            for row, margin, label in zip(rows, margins, found, strict=True)
        )
        tables = _build_model_table(labels[name]["models"]) if name in labels else ()
        views.append(View(name, found, verdicts, _build_charts(bench, rows, margins, found, verdicts), tables))
    return tuple(views)


def _build_charts(
    bench: Bench,
    rows: Sequence[Row],
    margins: Sequence[Number],
    labels: Sequence[int | None],
    verdicts: Sequence[str],
) -> tuple[Bars | Points, ...]:
    scored = [place for place, verdict in enumerate(verdicts) if verdict != UNSCORED]
    title, x_label = ("Margins", "reward of A less reward of B") if bench.is_paired else ("Rewards", "reward")
    values, groups = [rows[place].numbers[0] for place in scored], [verdicts[place] for place in scored]
    labelled = [place for place in scored if labels[place] is not None]
    charts = (
        build_histogram(title, x_label, values, groups),
        build_calibration([margins[place] for place in labelled], [labels[place] for place in labelled]),
    )
    return tuple(chart for chart in charts if chart is not None)


def _build_facts(bench: Bench, result: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    facts = {"model": result.get("model_ckpt"), "data": result.get("data_path", bench.path)}
    facts |= {"rows": f"{result['num_rows']}, of which {result['num_duplicate_rows']} duplicate"}
    counts = (f"{result['num_scored']} scored", f"{len(result['failures'])} failed", f"{result['num_cut']} cut")
    facts |= {"videos": f"{result['num_videos']}: {', '.join(counts)}", "mean reward": _show(result["mean_reward"])}
    if scale := result["scale"]:
        unit = f"{scale['mean']:.4f} +- {scale['std']:.4f} on {scale['num_videos']} videos of {scale['data']}"
        facts["rewards are in"] = f"standard deviations from the mean, {unit}"
    for name, value in dict(result.get("run") or {}).items():
        if name not in ("data", "format_prompt") and value is not None:
            is_many = isinstance(value, Mapping)
            facts[name] = ", ".join(f"{key} {part}" for key, part in value.items()) if is_many else value
    return tuple((name.replace("_", " "), str(value)) for name, value in facts.items() if value is not None)


def _build_accuracy_table(labels: Mapping[str, Mapping]) -> tuple[Table, ...]:
    if not labels:
        return ()
    columns = ("label", "without ties", "with ties", "tie up to", "one at a time", "decided", "ties", "unscored")
    rows = tuple(
        (
            name,
            _show_interval(values["without_ties"]),
            _show_interval(values["with_ties"]),
            "none" if values["threshold"] is None else _show(values["threshold"]),
            _show(values["sweep"], digits=3),
            *(str(values[count]) for count in ("num_decided", "num_ties", "num_unscored")),
        )
        for name, values in labels.items()
    )
    note = (
        "95% bootstrap intervals; chance without ties is 0.5. With ties: margins up to the one named count as a tie, "
        "chosen for the best accuracy; one at a time: the sweep behind published tables."
    )
    return (Table("Agreement with people", columns, rows, note),)


def _build_model_table(models: Sequence[Mapping[str, object]]) -> tuple[Table, ...]:
    if not models:
        return ()
    shares = ("accuracy", "human_win_rate", "reward_win_rate")
    rows = tuple(
        (row["model"], str(row["num_decided"]), *(_show(row[name], digits=3) for name in shares)) for row in models
    )
    return (Table("Generator models", ("model", "pairs", "accuracy", "people prefer it", "rewards do"), rows),)


def _show_interval(estimate: Mapping[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _show(value: Number, *, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
