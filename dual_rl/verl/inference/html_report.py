"""A page to look at what the model thought: of a benchmark run, or of the generations that training logged.

    python inference.py ... --report out.html
    python -m verl.inference.html_report RUN/generations.jsonl --output out.html --data val.csv

Stage 2 logs text only. With --data, the CSV that it validated on, the page shows the clips too.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.config import DataConfig
from verl.data.answers import SCORE_KEYS, extract_judgement, parse_annotation
from verl.data.pair_csv import CsvError, read_pairs
from verl.inference.bench_csv import Bench
from verl.inference.bench_page import build_bench_page, read_scores, unwrap_prompt
from verl.inference.html_page import Item, Page, Row, View, merge_scores, quote_path, relative_path, write_page
from verl.inference.journal import Journal
from verl.inference.report_charts import build_histogram, build_means
from verl.types import PreferencePair

WELL_FORMED, MALFORMED = VERDICTS = ("well-formed", "malformed")
OVERALL, HEAD = "reward/overall", "head_reward"
NEEDED = ("step", "pair_id", "side", "sample", "prompt", "response", "answer")


def write_report(path: str | os.PathLike, bench: Bench, journal: Journal, result: Mapping[str, object]) -> None:
    """The page of a benchmark run; `result` is what the run writes as JSON. Raises ValueError unless it is .html."""
    write_page(path, build_bench_page(Path(path), bench, journal, result))


def write_generations_report(
    path: str | os.PathLike,
    generations_jsonl: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    video_root: str | None = None,
) -> None:
    """The page of stage 2's generations.jsonl. `data`: the CSV that the run validated on, for the clips.

    `video_root`: folder of relative video paths, None for the CSV's. Raises ValueError for a line that is no
    generation, and for a CSV with other problems; a last line that is still being written is left out.
    """
    generations = read_generations(generations_jsonl)
    pairs = None if data is None else read_pairs(data, DataConfig(image_dir=video_root))
    for row in generations if pairs is not None else ():
        if row["pair_id"] >= len(pairs) or pairs[row["pair_id"]].problem != row["prompt"]:
            fault = f"row {row['pair_id'] + 1} is not what generations were made for: give the run's data.val_files"
            raise CsvError(data, [fault])
    write_page(path, build_generations_page(Path(path), Path(generations_jsonl), generations, pairs))


def read_generations(path: str | os.PathLike) -> list[dict[str, Any]]:
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


def build_generations_page(
    path: Path, source: Path, generations: Sequence[dict[str, Any]], pairs: Sequence[PreferencePair] | None
) -> Page:
    """The page that will stand at `path`, of what `source` holds: one row a generation, thoughts by step."""
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(row["prompt"] for row in generations))}
    steps = [row["step"] for row in generations]
    facts = {
        "generations": f"{len(generations)} of steps {', '.join(map(str, dict.fromkeys(steps)))}",
        "file": str(source),
    }
    return Page(
        title=f"Generations of {source.resolve().parent.name}",
        facts=tuple(facts.items()),
        tables=(),
        failures=(),
        sides=("",),
        sorts=("step", "reward", "head reward"),
        verdicts=VERDICTS,
        facets=("step", "side"),
        main=0,
        views=(_build_view(generations, steps),),
        prompts=tuple(map(unwrap_prompt, prompts)),
        items=tuple(_build_item(path, row, pairs) for row in generations),
        rows=tuple(_build_row(place, row, prompts[row["prompt"]]) for place, row in enumerate(generations)),
    )


def _build_view(generations: Sequence[dict[str, Any]], steps: Sequence[int]) -> View:
    verdicts = tuple(MALFORMED if extract_judgement(row["response"]) is None else WELL_FORMED for row in generations)
    rewarded = [place for place, row in enumerate(generations) if row.get(OVERALL) is not None]
    charts = (
        build_histogram(
            "Rewards by rule",
            "overall reward",
            [generations[place][OVERALL] for place in rewarded],
            [verdicts[place] for place in rewarded],
        ),
        build_means("Reward by rule", "mean overall reward", steps, [row.get(OVERALL) for row in generations]),
        build_means("Reward of the head", "mean head reward", steps, [row.get(HEAD) for row in generations]),
    )
    return View("", (None,) * len(generations), verdicts, tuple(chart for chart in charts if chart is not None))


def _build_item(path: Path, row: dict[str, Any], pairs: Sequence[PreferencePair] | None) -> Item:
    name = f"pair {row['pair_id']}, {row['side']}"
    if pairs is None:
        return Item(None, name, row.get(OVERALL), row["response"], "")
    video = relative_path(pairs[row["pair_id"]].videos["AB".index(row["side"])], path)
    return Item(quote_path(video), f"{name}: {video}", row.get(OVERALL), row["response"], "")


def _build_row(place: int, row: dict[str, Any], prompt: int) -> Row:
    """Sub-scores beside those of the annotators, where there are any."""
    columns = {"model": read_scores(row["response"])}
    if annotated := _read_annotation(row):
        columns["annotators"] = annotated
    lines = merge_scores(list(columns.values()))
    head = row.get(HEAD)
    parts = [f"step {row['step']}", f"sample {row['sample']}"]
    parts += [] if head is None else [f"head {head:.4f}"]
    parts += [f"{name.removeprefix('reward/')} {value}" for name, value in row.items() if name.startswith("reward/")]
    return Row(
        number=place + 1,
        items=(place,),
        prompt=prompt,
        models=(),
        summary=", ".join(parts),
        numbers=(row["step"], row.get(OVERALL), head),
        facets=((str(row["step"]),), (row["side"],)),
        score_columns=tuple(columns) if lines else (),
        scores=lines,
    )


def _read_annotation(row: dict[str, Any]) -> dict[str, str]:
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
