"""A page to look at what the model thought: of a benchmark run, or of the generations that training logged.

    python inference.py ... --report out.html
    python -m scoring.html_report RUN/generations.jsonl --output out.html --data val.csv

Stage 2 logs text only. With --data, the CSV that it validated on, the page shows the clips too.

A page is one self-contained file. Its content is embedded as JSON and drawn by its own script, html_report.js, which
reads what `_build_page` names. Nothing in it can run or load: the JSON cannot end its element, the script inserts text
as text, and a content security policy names the hashes of the page's own script and style and allows no sources but
the clips, which lie beside the page by relative path.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from descore.answers import JUDGEMENT_KEY, OVERALL_KEY, SCORE_KEYS, extract_judgement, parse_annotation
from descore.csv_table import CsvError
from scoring.bench_csv import Bench, BenchRow
from scoring.journal import Journal
from scoring.report import build_accuracy_table, build_model_table, choose_main_label, describe_scale
from scoring.report_charts import build_calibration, build_histogram, build_means, sigmoid
from scoring.scale import RewardScale
from verl.config import DataConfig
from verl.data.pair_csv import read_pairs
from verl.data.scored_sequence import JUDGE_PROMPT
from verl.trainer.checkpoints import write_atomically
from verl.types import PreferencePair

TEMPLATE = Path(__file__).with_name("html_report.html")
"""Its style and script lie beside it."""
POLICY = (
    "default-src 'none'; media-src 'self' file:; style-src {style}; script-src {script}; "
    "base-uri 'none'; form-action 'none'"
)
RIGHT, WRONG, TIE, UNLABELLED, UNSCORED = VERDICTS = ("right", "wrong", "tie", "unlabelled", "unscored")
WELL_FORMED, MALFORMED = FORMS = ("well-formed", "malformed")
CUT = "cut at the length limit: the reward is read after what there is"
MAX_SCORE_CHARACTERS = 80
OVERALL, HEAD = "reward/overall", "head_reward"
NEEDED = ("step", "pair_id", "side", "sample", "prompt", "response", "answer")
_BEFORE_PROMPT, _AFTER_PROMPT = JUDGE_PROMPT.format(prompt="\0").split("\0")
_PLACE = re.compile(r"@(POLICY|STYLE|SCRIPT|DATA)@")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
Json = dict[str, Any]


def check_page_path(path: str | os.PathLike) -> None:
    """Raises ValueError for a name that browsers would not open as a page."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the report is {path}; name a .html file")


def write_report(path: str | os.PathLike, bench: Bench, journal: Journal, result: Mapping[str, Any]) -> None:
    """The page of a benchmark run; `result` is what the run writes as JSON. Raises ValueError unless it is .html."""
    _write_page(path, _build_bench_page(Path(path), bench, journal, result))


def write_generations_report(
    path: str | os.PathLike,
    generations_jsonl: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    video_root: str | None = None,
) -> None:
    """The page of stage 2's generations.jsonl. `data`: the CSV that the run validated on, for the clips.

    `video_root`: folder of relative video paths, None for the CSV's. Raises ValueError for a line that is not a
    generation, and for a CSV with other problems; a last line that is still being written is left out.
    """
    generations = _read_generations(generations_jsonl)
    pairs = None if data is None else read_pairs(data, DataConfig(image_dir=video_root))
    for row in generations if pairs is not None else ():
        if row["pair_id"] >= len(pairs) or pairs[row["pair_id"]].problem != row["prompt"]:
            fault = f"row {row['pair_id'] + 1} is not what generations were made for: give the run's data.val_files"
            raise CsvError(data, [fault])
    _write_page(path, _build_generations_page(Path(path), Path(generations_jsonl), generations, pairs))


def _write_page(path: str | os.PathLike, page: Json) -> None:
    """Write the page, complete or not at all; its folder is made if need be."""
    check_page_path(path)
    template, style, script = (TEMPLATE.with_suffix(suffix).read_text() for suffix in (".html", ".css", ".js"))
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    policy = POLICY.format(style=f"'sha256-{hashes[0]}'", script=f"'sha256-{hashes[1]}'")
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": _embed_json(page)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), _PLACE.sub(lambda match: parts[match[1]], template))


def _embed_json(content: object) -> str:
    """JSON that can stand in a script element: `<` only as an escape, no NaN, no half of a surrogate pair."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=vars)
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("<", "\\u003c"))


def _build_page(*, title: str, facts: Mapping[str, object], verdicts: Sequence[str], **content: Any) -> Json:
    """All that is shown.

    `facts`: name -> value. `verdicts`: what rows are filtered by; `facets` likewise, each with a choice among the
    values that occur. `sides`: names of a row's items, "" for one. `sorts`: what `numbers` of a row are. `views`: the
    rows as one label column sees them, per row `labels` (+1, -1, 0, None) and `verdicts`, with charts and tables;
    `main`: the index of the view to begin with. `items`: the videos, see `_build_item`; `rows`: see `_build_row`.
    """
    shown = [(name.replace("_", " "), str(value)) for name, value in facts.items() if value is not None]
    empty = {"tables": (), "failures": (), "facets": (), "sides": ("",), "main": 0}
    return {**empty, "title": title, "facts": shown, "verdicts": verdicts, **content}


def _build_item(path: Path, video: str | None, *, name: str, reward: float | None, thought: str | None) -> Json:
    """A video and what the model made of it. `clip`: URL relative to the page at `path`, None without a file."""
    clip = None if video is None else quote(os.fsencode(_relative_path(video, path)))
    return {"clip": clip, "name": name, "reward": reward, "thought": thought, "note": ""}


def _build_row(number: int, items: Sequence[int], prompt: int, scores: Mapping[str, Mapping[str, str]]) -> Json:
    """A pair, or a single video; `items`, `prompt`: indices. `scores`: column -> dimension -> sub-score.

    The page gets a line a dimension, in order of first mention, "-" where a column has none.
    """
    dimensions = dict.fromkeys(name for column in scores.values() for name in column)
    lines = [(name, *(column.get(name, "-") for column in scores.values())) for name in dimensions]
    columns = tuple(scores) if lines else ()
    return {
        "number": number,
        "items": items,
        "prompt": prompt,
        "models": (),
        "score_columns": columns,
        "scores": lines,
    }


def _relative_path(video: str | os.PathLike, page: str | os.PathLike) -> str:
    """Path of a file as seen from the page's folder, links to folders followed on both sides."""
    target, folder = Path(video), Path(page).resolve().parent
    return Path(os.path.relpath(target.parent.resolve() / target.name, folder)).as_posix()


def _read_scores(thought: str | None) -> dict[str, str]:
    """Dimension -> score as the thought's `<answer>` has it, the overall one last; empty without a judgement."""
    judgement = extract_judgement(thought or "") or {}
    scores = judgement.get(JUDGEMENT_KEY)
    found = dict(scores) if isinstance(scores, dict) else {}
    if OVERALL_KEY in judgement:
        found["overall"] = judgement[OVERALL_KEY]
    return {name: str(score)[:MAX_SCORE_CHARACTERS] for name, score in found.items()}


def _unwrap_prompt(problem: str) -> str:
    """The text that the video was made from, where the built-in judge prompt is around it; else all of it."""
    if problem.startswith(_BEFORE_PROMPT) and problem.endswith(_AFTER_PROMPT):
        return problem[len(_BEFORE_PROMPT) : len(problem) - len(_AFTER_PROMPT)]
    return problem


# Benchmark runs


def _build_bench_page(path: Path, bench: Bench, journal: Journal, result: Mapping[str, Any]) -> Json:
    """The page that will stand at `path`; rewards are on the scale that `result` names.

    Probabilities are of the unscaled margin: only that is Bradley-Terry's.
    """
    scale = None if result["scale"] is None else RewardScale(**result["scale"])
    items = [_build_scored_item(path, bench, journal, name, scale=scale) for name in bench.items]
    scores = [_read_scores(item["thought"]) for item in items]
    indices = {name: index for index, name in enumerate(bench.items)}
    prompts = {problem: n for n, problem in enumerate(dict.fromkeys(item.problem for item in bench.items.values()))}
    sides = ("A", "B") if bench.is_paired else ("score",)
    rows, margins = [], []
    for number, row in enumerate(bench.rows, start=1):
        of_row = [indices[name] for name in row.item_ids]
        rewards = [items[index]["reward"] for index in of_row]
        margin = _compute_margin(row, journal.rewards)
        shown = None if margin is None else rewards[0] - rewards[1]
        prompt = prompts[bench.items[row.item_ids[0]].problem]
        rows.append(_build_row(number, of_row, prompt, {s: scores[i] for s, i in zip(sides, of_row, strict=True)}))
        rows[-1] |= {
            "models": row.models or (),
            "summary": "" if margin is None else f"margin {shown:+.4f}, P(A is better) {sigmoid(margin):.3f}",
            "numbers": [shown, None if shown is None else abs(shown), *rewards] if bench.is_paired else rewards,
            "facets": [list(dict.fromkeys(row.models or ()))],
        }
        margins.append(margin)
    main = choose_main_label(bench.label_columns)
    return _build_page(
        title=f"{bench.bench_type}: {os.path.basename(bench.path)}",
        facts=_build_facts(bench, result),
        tables=[build_accuracy_table(result["labels"])] if result["labels"] else [],
        failures=[failure["error"] for failure in result["failures"]],
        sides=sides if bench.is_paired else ("",),
        sorts=("margin", "|margin|", "reward A", "reward B") if bench.is_paired else ("reward",),
        verdicts=VERDICTS if bench.label_columns else (UNLABELLED, UNSCORED),
        facets=("generator model",) if any(row.models for row in bench.rows) else (),
        main=bench.label_columns.index(main) if main else 0,
        views=_build_views(bench, margins, rows, result["labels"]),
        prompts=list(map(_unwrap_prompt, prompts)),
        items=items,
        rows=rows,
    )


def _build_scored_item(path: Path, bench: Bench, journal: Journal, name: str, *, scale: RewardScale | None) -> Json:
    video = bench.items[name].video
    found = None if name in bench.missing else video
    item = _build_item(path, found, name=_relative_path(video, path), reward=None, thought=None)
    if name not in journal.rewards:
        return item | {"note": journal.failures.get(name, "not scored")}
    scored = journal.read(name)
    reward = scored.reward if scale is None else scale.apply(scored.reward)
    return item | {"reward": reward, "thought": scored.cot, "note": "" if scored.is_finished else CUT}


def _compute_margin(row: BenchRow, rewards: Mapping[str, float]) -> float | None:
    """Unscaled; None for a single video, or without both rewards."""
    if len(row.item_ids) != 2 or not all(name in rewards for name in row.item_ids):
        return None
    return rewards[row.item_ids[0]] - rewards[row.item_ids[1]]


def _judge_row(row: Json, margin: float | None, label: int | None) -> str:
    """One of VERDICTS. As in the accuracies, equal rewards are wrong about a pair that people decide."""
    if None in row["numbers"]:
        return UNSCORED
    if label is None or margin is None:
        return UNLABELLED
    if label == 0:
        return TIE
    return RIGHT if margin * label > 0 else WRONG


def _build_views(
    bench: Bench, margins: Sequence[float | None], rows: Sequence[Json], summaries: Mapping[str, Mapping]
) -> list[Json]:
    title, x_label = ("Margins", "reward of A less reward of B") if bench.is_paired else ("Rewards", "reward")
    views = []
    for column, name in enumerate(bench.label_columns or ("",)):
        labels = [row.labels[column] if bench.label_columns else None for row in bench.rows]
        verdicts = [_judge_row(*each) for each in zip(rows, margins, labels, strict=True)]
        scored = [index for index, verdict in enumerate(verdicts) if verdict != UNSCORED]
        labelled = [index for index in scored if labels[index] is not None]
        charts = (
            build_histogram(
                title, x_label, [rows[index]["numbers"][0] for index in scored], [verdicts[index] for index in scored]
            ),
            build_calibration([margins[index] for index in labelled], [labels[index] for index in labelled]),
        )
        models = summaries[name]["models"] if name in summaries else ()
        tables = [build_model_table(name, models)] if models else []
        charts = [chart for chart in charts if chart is not None]
        views.append({"name": name, "labels": labels, "verdicts": verdicts, "charts": charts, "tables": tables})
    return views


def _build_facts(bench: Bench, result: Mapping[str, Any]) -> dict[str, object]:
    counts = f"{result['num_scored']} scored, {len(result['failures'])} failed, {result['num_cut']} cut"
    mean = result["mean_reward"]
    facts = {
        "model": result.get("model_ckpt"),
        "data": result.get("data_path", bench.path),
        "rows": f"{result['num_rows']}, of which {result['num_duplicate_rows']} duplicate",
        "videos": f"{result['num_videos']}: {counts}",
        "mean reward": None if mean is None else f"{mean:.4f}",
        "rewards are in": describe_scale(result["scale"]),
    }
    for name, value in dict(result.get("run") or {}).items():
        if name not in ("data", "format_prompt"):
            is_many = isinstance(value, Mapping)
            facts[name] = ", ".join(f"{key} {part}" for key, part in value.items()) if is_many else value
    return facts


# Generations of training


def _read_generations(path: str | os.PathLike) -> list[Json]:
    """The lines of a generations.jsonl that are whole, in order."""
    if not Path(path).is_file():
        raise ValueError(f"no {path}: give the generations.jsonl of a run with the `file` logger")
    generations = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict) or any(name not in row for name in NEEDED) or row["side"] not in SCORE_KEYS:
            raise ValueError(f"{path}, line {number}: no generation of stage 2, which has {', '.join(NEEDED)}")
        generations.append(row)
    if not generations:
        raise ValueError(f"{path} has no generations yet: stage 2 logs them when it validates")
    return generations


def _build_generations_page(
    path: Path, source: Path, generations: Sequence[Json], pairs: Sequence[PreferencePair] | None
) -> Json:
    """The page that will stand at `path`, of what `source` holds: one row a generation, thoughts by step."""
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(row["prompt"] for row in generations))}
    steps, rewards = [row["step"] for row in generations], [row.get(OVERALL) for row in generations]
    verdicts = [MALFORMED if extract_judgement(row["response"]) is None else WELL_FORMED for row in generations]
    rewarded = [index for index, reward in enumerate(rewards) if reward is not None]
    charts = (
        build_histogram(
            "Rewards by rule",
            "overall reward",
            [rewards[index] for index in rewarded],
            [verdicts[index] for index in rewarded],
        ),
        build_means("Reward by rule", "mean overall reward", steps, rewards),
        build_means("Reward of the head", "mean head reward", steps, [row.get(HEAD) for row in generations]),
    )
    view = {"name": "", "labels": [None] * len(generations), "verdicts": verdicts, "tables": []}
    of_steps = f"{len(generations)} of steps {', '.join(map(str, dict.fromkeys(steps)))}"
    return _build_page(
        title=f"Generations of {source.resolve().parent.name}",
        facts={"generations": of_steps, "file": source},
        sorts=("step", "reward", "head reward"),
        verdicts=FORMS,
        facets=("step", "side"),
        views=[view | {"charts": [chart for chart in charts if chart is not None]}],
        prompts=list(map(_unwrap_prompt, prompts)),
        items=[_build_generated_item(path, row, pairs) for row in generations],
        rows=[_build_generated_row(index, row, prompts[row["prompt"]]) for index, row in enumerate(generations)],
    )


def _build_generated_item(path: Path, row: Json, pairs: Sequence[PreferencePair] | None) -> Json:
    name, video = f"pair {row['pair_id']}, {row['side']}", None
    if pairs is not None:
        video = pairs[row["pair_id"]].videos["AB".index(row["side"])]
        name += f": {_relative_path(video, path)}"
    return _build_item(path, video, name=name, reward=row.get(OVERALL), thought=row["response"])


def _build_generated_row(index: int, row: Json, prompt: int) -> Json:
    """Sub-scores beside those of the annotators, where there are any."""
    columns = {"model": _read_scores(row["response"])}
    if annotated := _read_annotation(row):
        columns["annotators"] = annotated
    head = row.get(HEAD)
    parts = [f"step {row['step']}", f"sample {row['sample']}"]
    parts += [] if head is None else [f"head {head:.4f}"]
    parts += [f"{name.removeprefix('reward/')} {value}" for name, value in row.items() if name.startswith("reward/")]
    return _build_row(index + 1, [index], prompt, columns) | {
        "summary": ", ".join(parts),
        "numbers": [row["step"], row.get(OVERALL), head],
        "facets": [[str(row["step"])], [row["side"]]],
    }


def _read_annotation(row: Json) -> dict[str, str]:
    try:
        scores = parse_annotation(row["answer"]).scores[row["side"]]
    except ValueError:  # the run's own reward function may read another form
        return {}
    return {name: str(score) for name, score in scores.items()}


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
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
