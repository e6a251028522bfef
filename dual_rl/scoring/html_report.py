"""A page to look at what the model thought: of a benchmark run, or of the generations that training logged.

    python inference.py ... --report out.html
    python -m scoring.html_report RUN/generations.jsonl --output out.html --data val.csv

Stage 2 logs text only. With --data, the CSV that it validated on, the page shows the clips too.

A page is one self-contained file, made from html_report.html. Its rows are embedded as JSON and drawn by its own
script. No text in it can run or load anything: the JSON cannot end its element, the script inserts text as text, and a
content security policy allows only the page's own script and style, by a random nonce, and the clips, which are linked
by relative path.

What is embedded: `items`, the videos (`clip`, a URL relative to the page or None, `name`, `reward`, `thought`,
`note`, and `scores`, column -> dimension -> sub-score); `prompts`; `rows`, a pair or a single video each (`number`,
`items` and `prompt` as indices, `models`, `summary`, `numbers` to sort by, `facets` to filter by); `sides` and
`sorts`, the names of a row's items and numbers; `verdicts` that rows may have; `tables`; and `views`, the rows as one
label column sees them (`labels`, `verdicts`, `charts`, `tables`), of which `main` is shown first.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader

from descore.answers import JUDGEMENT_KEY, OVERALL_KEY, SCORE_KEYS, extract_judgement, parse_annotation
from descore.csv_table import CsvError
from scoring.bench_csv import Bench
from scoring.journal import Journal
from scoring.report import build_accuracy_table, build_model_table, choose_main_label, describe_scale
from scoring.report_charts import build_calibration, build_histogram, sigmoid
from scoring.source import RewardScale, apply_scale_to_video
from verl.config import DataConfig
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import JUDGE_PROMPT
from verl.trainer.checkpoints import write_atomically
from verl.types import PreferencePair

TEMPLATE = Path(__file__).with_name("html_report.html")
VERDICTS = ("right", "wrong", "tie", "unlabelled", "unscored")
FORMS = ("well-formed", "malformed")
CUT = "cut at the length limit: the reward is read after what there is"
MAX_SCORE_CHARACTERS = 80
OVERALL, HEAD = "reward/overall", "head_reward"
NEEDED = ("step", "pair_id", "side", "sample", "prompt", "response", "answer")
Json = dict[str, Any]


def check_page_path(path: str | os.PathLike) -> None:
    """Raise ValueError for a name that browsers would not open as a page."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the report is {path}; name a .html file")


def _write_page(path: Path, **content: Any) -> None:
    """Write the page, complete or not at all; its folder is made if needed.

    `content`: `title`; `facts`, name -> value, None to leave it out; `facets`, name -> values that rows are filtered
    by; `failures`, messages; `data`, what is embedded.
    """
    check_page_path(path)
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template(TEMPLATE.name).render(nonce=secrets.token_hex(16), **content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def _build_item(page: Path, video: str | None, thought: str | None, **content: Any) -> Json:
    clip = None if video is None else quote(os.fsencode(_relative_path(video, page)))
    return {"clip": clip, "thought": thought, "note": "", "scores": {}, **content}


def _relative_path(video: str, page: Path) -> str:
    """Path of a file from the page's folder; links to folders are resolved on both sides."""
    target = Path(video)
    return Path(os.path.relpath(target.parent.resolve() / target.name, page.resolve().parent)).as_posix()


def _read_scores(thought: str) -> dict[str, str]:
    """Dimension -> score as the thought's `<answer>` has it, the overall one last; empty without a judgement."""
    judgement = extract_judgement(thought) or {}
    scores = judgement.get(JUDGEMENT_KEY)
    found = dict(scores) if isinstance(scores, dict) else {}
    if OVERALL_KEY in judgement:
        found["overall"] = judgement[OVERALL_KEY]
    return {name: str(score)[:MAX_SCORE_CHARACTERS] for name, score in found.items()}


def _number(values: Iterable[str]) -> dict[str, int]:
    """Index of each distinct value, in order of first mention."""
    return {value: index for index, value in enumerate(dict.fromkeys(values))}


def _unwrap_prompt(problem: str) -> str:
    """The text that the video was made from, without the built-in judge prompt around it."""
    before, after = JUDGE_PROMPT.format(prompt="\0").split("\0")
    is_wrapped = problem.startswith(before) and problem.endswith(after)
    return problem.removeprefix(before).removesuffix(after) if is_wrapped else problem


# Benchmark runs


def write_report(path: str | os.PathLike, bench: Bench, journal: Journal, result: Mapping[str, Any]) -> None:
    """The page of a benchmark run; `result` is what the run writes as JSON, and names the scale of the rewards.

    Probabilities are of the unscaled margin: only that is Bradley-Terry's. Raises ValueError unless the page is .html.
    """
    path, scale = Path(path), None if result["scale"] is None else RewardScale(**result["scale"])
    items = {name: _build_scored_item(path, bench, journal, name, scale) for name in bench.items}
    indices, prompts = _number(items), _number(item.problem for item in bench.items.values())
    margins = [row.compute_margin(journal.rewards) for row in bench.rows]
    rows = [
        {
            "number": number,
            "items": [indices[name] for name in row.item_ids],
            "prompt": prompts[bench.items[row.item_ids[0]].problem],
            "models": row.models or (),
            "facets": [row.models or ()],
            **_show_rewards([items[name]["reward"] for name in row.item_ids], margin),
        }
        for number, (row, margin) in enumerate(zip(bench.rows, margins, strict=True), start=1)
    ]
    main, models = choose_main_label(bench.label_columns), {model for row in bench.rows for model in row.models or ()}
    _write_page(
        path,
        title=f"{bench.bench_type}: {os.path.basename(bench.path)}",
        facts=_build_facts(result),
        facets={"generator model": sorted(models)} if models else {},
        failures=[failure["error"] for failure in result["failures"]],
        data={
            "sorts": ("margin", "|margin|", "reward A", "reward B") if bench.is_paired else ("reward",),
            "sides": ("A", "B") if bench.is_paired else ("",),
            "verdicts": VERDICTS if bench.label_columns else VERDICTS[3:],
            "tables": [asdict(build_accuracy_table(result["labels"]))] if result["labels"] else [],
            "main": bench.label_columns.index(main) if main else 0,
            "views": _build_views(bench, margins, rows, result["labels"], has_two_scales="thinking" in result),
            "prompts": list(map(_unwrap_prompt, prompts)),
            "items": list(items.values()),
            "rows": rows,
        },
    )


def _build_scored_item(path: Path, bench: Bench, journal: Journal, name: str, scale: RewardScale | None) -> Json:
    video = bench.items[name].video
    found, shown = None if name in bench.missing else video, _relative_path(video, path)
    if name not in journal.rewards:
        return _build_item(path, found, None, name=shown, reward=None, note=journal.failures.get(name, "not scored"))
    scored = apply_scale_to_video(journal.read(name), scale)
    thought, notes = scored.cot, [] if scored.is_finished else [CUT]
    if scored.thoughts:
        notes.append(f"mean of {len(scored.thoughts)} thoughts, standard error {scored.standard_error:.4f}")
        thought = "\n\n".join(f"(reward {each.reward:.4f})\n{each.cot}" for each in scored.thoughts)
    scores, note = {"score": _read_scores(scored.cot)}, "; ".join(notes)
    return _build_item(path, found, thought, name=shown, reward=scored.reward, note=note, scores=scores)


def _show_rewards(rewards: Sequence[float | None], margin: float | None) -> Json:
    """Summary and numbers of a row. `rewards`: as shown. `margin`: unscaled."""
    if len(rewards) == 1 or margin is None:
        return {"summary": "", "numbers": rewards if len(rewards) == 1 else [None, None, *rewards]}
    shown = rewards[0] - rewards[1]
    summary = f"margin {shown:+.4f}, P(A is better) {sigmoid(margin):.3f}"
    return {"summary": summary, "numbers": [shown, abs(shown), *rewards]}


def _judge_row(row: Json, margin: float | None, label: int | None) -> str:
    """One of VERDICTS. As in the accuracies, equal rewards are wrong for a pair that people decide."""
    if None in row["numbers"]:
        return "unscored"
    if label is None or margin is None:
        return "unlabelled"
    if label == 0:
        return "tie"
    return "right" if margin * label > 0 else "wrong"


def _build_views(
    bench: Bench,
    margins: Sequence[float | None],
    rows: Sequence[Json],
    summaries: Mapping[str, Mapping],
    *,
    has_two_scales: bool,
) -> list[Json]:
    """`has_two_scales`: some rewards are of no thought, which no chart shows beside others."""
    title, x_label = ("Margins", "reward of A minus reward of B") if bench.is_paired else ("Rewards", "reward")
    values, views = [row["numbers"][0] for row in rows], []
    for column, name in enumerate(bench.label_columns or ("",)):
        labels = [row.labels[column] if bench.label_columns else None for row in bench.rows]
        verdicts = [_judge_row(*each) for each in zip(rows, margins, labels, strict=True)]
        charts = [build_histogram(title, x_label, values, verdicts), build_calibration(margins, labels)]
        charts = [] if has_two_scales else charts
        models = summaries[name]["models"] if name in summaries else ()
        tables = [asdict(build_model_table(name, models))] if models else []
        views.append({"name": name, "labels": labels, "verdicts": verdicts, "tables": tables, "charts": charts})
    return views


def _build_facts(result: Mapping[str, Any]) -> dict[str, object]:
    counts = f"{result['num_scored']} scored, {len(result['failures'])} failed, {result['num_cut']} cut"
    return {
        "model": result.get("model_ckpt"),
        "data": result.get("data_path"),
        "rows": f"{result['num_rows']}, of which {result['num_duplicate_rows']} duplicate",
        "videos": f"{result['num_videos']}: {counts}",
        "mean reward": None if result["mean_reward"] is None else f"{result['mean_reward']:.4f}",
        "videos that thought": result.get("thinking", {}).get("num_thought"),
        "rewards are in": describe_scale(result["scale"]),
        **{name: value for name, value in result.get("run", {}).items() if name not in ("data", "format_prompt")},
    }


# Generations of training


def write_generations_report(
    path: str | os.PathLike,
    generations_jsonl: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    video_root: str | None = None,
) -> None:
    """The page of stage 2's generations.jsonl, one row per generation.

    `data`: the run's validation CSV, for the clips. `video_root`: folder of relative video paths, None for the CSV's.
    Raises ValueError for another file, and for a CSV with other problems; a last line that is still being written is
    left out.
    """
    path, generations = Path(path), _read_generations(generations_jsonl)
    pairs = None if data is None else read_pairs(data, DataConfig(image_dir=video_root))
    for row in generations if pairs is not None else ():
        if row["pair_id"] >= len(pairs) or pairs[row["pair_id"]].problem != row["prompt"]:
            fault = f"row {row['pair_id'] + 1} is not what generations were made for: give the run's data.val_files"
            raise CsvError(data, [fault])
    prompts, steps = _number(row["prompt"] for row in generations), _number(str(row["step"]) for row in generations)
    verdicts = [FORMS[extract_judgement(row["response"]) is None] for row in generations]
    rewards = [row.get(OVERALL) for row in generations]
    chart = build_histogram("Rewards by rule", "overall reward", rewards, verdicts)
    view = {"name": "", "labels": [None] * len(rewards), "verdicts": verdicts, "tables": [], "charts": [chart]}
    _write_page(
        path,
        title=f"Generations of {Path(generations_jsonl).resolve().parent.name}",
        facts={"generations": f"{len(generations)} of steps {', '.join(steps)}", "file": generations_jsonl},
        facets={"step": list(steps), "side": tuple(SCORE_KEYS)},
        data={
            "sorts": ("step", "reward", "head reward"),
            "sides": ("",),
            "verdicts": FORMS,
            "tables": [],
            "main": 0,
            "views": [view],
            "prompts": list(map(_unwrap_prompt, prompts)),
            "items": [_build_generated_item(path, row, pairs) for row in generations],
            "rows": [_build_generated_row(index, row, prompts) for index, row in enumerate(generations)],
        },
    )


def _read_generations(path: str | os.PathLike) -> list[Json]:
    """The whole lines of a generations.jsonl, in order."""
    generations = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = {}
        if not isinstance(row, dict) or not all(name in row for name in NEEDED) or row["side"] not in SCORE_KEYS:
            raise ValueError(f"{path}, line {number}: not a generation of stage 2, which has {', '.join(NEEDED)}")
        generations.append(row)
    if not generations:
        raise ValueError(f"{path} has no generation yet")
    return generations


def _build_generated_item(path: Path, row: Json, pairs: Sequence[PreferencePair] | None) -> Json:
    """Its sub-scores are beside those of the annotators, if there are any."""
    name, video = f"pair {row['pair_id']}, {row['side']}", None
    if pairs is not None:
        video = pairs[row["pair_id"]].videos["AB".index(row["side"])]
        name += f": {_relative_path(video, path)}"
    scores = {"model": _read_scores(row["response"])}
    try:
        annotated = parse_annotation(row["answer"]).scores[row["side"]]
    except ValueError:  # the run's own reward function may read another form
        annotated = {}
    if annotated:
        scores["annotators"] = {name: str(score) for name, score in annotated.items()}
    return _build_item(path, video, row["response"], name=name, reward=row.get(OVERALL), scores=scores)


def _build_generated_row(index: int, row: Json, prompts: Mapping[str, int]) -> Json:
    head = row.get(HEAD)
    parts = [f"step {row['step']}", f"sample {row['sample']}"]
    parts += [] if head is None else [f"head {head:.4f}"]
    parts += [f"{name.removeprefix('reward/')} {value}" for name, value in row.items() if name.startswith("reward/")]
    return {
        "number": index + 1,
        "items": [index],
        "prompt": prompts[row["prompt"]],
        "models": (),
        "summary": ", ".join(parts),
        "numbers": [row["step"], row.get(OVERALL), head],
        "facets": [[str(row["step"])], [row["side"]]],
    }


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generations", help="generations.jsonl of a stage 2 run")
    parser.add_argument("--output", required=True, help="HTML file to write")
    parser.add_argument("--data", help="CSV of the run's data.val_files: shows the clips")
    parser.add_argument("--video_root", help="folder of relative video paths; default: the CSV's")
    options = parser.parse_args(argv)
    try:
        write_generations_report(options.output, options.generations, data=options.data, video_root=options.video_root)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
