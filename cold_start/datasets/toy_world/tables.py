"""The CSV files: pairs as rows of the training, evaluation and benchmark formats.

datasets/eval/README.md describes the columns. Benchmark labels carry no noise.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .scene import DIMENSIONS, NOT_ASKED, overall_score, prefer
from .world import Clip, Pair

Row = dict[str, object]

BENCH_GROUPS = {"VQ": ("style",), "MQ": ("dynamics", "camera"), "TA": ("subject", "environment")}
GENAI_VOTES = {"A": "leftvote", "B": "rightvote", "same": "tievote"}
HELD_OUT_FILE = "bench_held_out.csv"
HELD_OUT_SETS = {"in_domain": "in_domain", "eval": "new_combinations", "new_rendering": "new_rendering"}


def video_path(clip: Clip) -> str:
    """The clip's path relative to the CSV files."""
    return f"videos/{clip.name}"


def training_row(pair: Pair, problem: str) -> Row:
    """A row of the stage 1 format."""
    clip_a, clip_b = pair.clips
    return {
        "videos": str([video_path(clip) for clip in pair.clips]),
        "problem": problem,
        "durations": str([round(clip.nuisance.duration, 4) for clip in pair.clips]),
        "prompt": pair.prompt,
        "CoT_A": clip_a.cot,
        "CoT_B": clip_b.cot,
        "GSB": pair.label,
        "MOS_A_GSB": round(overall_score(clip_a.scores), 4),
        "MOS_B_GSB": round(overall_score(clip_b.scores), 4),
        **_label_groups(pair),
    }


def rl_row(pair: Pair, problem: str) -> Row:
    """A row of the stage 2 format; `answer` holds the true sub-scores of both clips and the label of the pair."""
    scores = {f"video_{number}_scores": clip.scores for number, clip in enumerate(pair.clips, start=1)}
    answer = f"<answer>{json.dumps({**scores, 'gsb_result': pair.label})}</answer>"
    return {"videos": str([video_path(clip) for clip in pair.clips]), "problem": problem, "answer": answer}


def _label_of(pair: Pair, dimensions: tuple[str, ...]) -> str:
    """The label by the unweighted sum of the sub-scores of `dimensions`."""
    counted = ([clip.scores[name] for name in dimensions if clip.scores[name] != NOT_ASKED] for clip in pair.clips)
    return prefer(*map(sum, counted))


def _label_groups(pair: Pair) -> dict[str, str]:
    """Labels by the names of BENCH_GROUPS."""
    return {name: _label_of(pair, group) for name, group in BENCH_GROUPS.items()}


def bench_rows(pair: Pair) -> dict[str, list[Row]]:
    """The rows of a pair in each benchmark's columns. videofeedback has one row per clip, the others one per pair."""
    clip_a, clip_b = pair.clips
    path_a, path_b = map(video_path, pair.clips)
    two_sided = {"path_A": path_a, "path_B": path_b, "A_model": clip_a.generator, "B_model": clip_b.generator}
    two_sided["prompt"] = pair.prompt
    details = {}
    for side, clip in zip("AB", pair.clips, strict=True):
        details |= {f"fps_{side}": clip.nuisance.fps, f"num_frames_{side}": clip.nuisance.num_frames}
    groups = _label_groups(pair)
    is_asked = pair.request.mentioned.__contains__
    by_dimension = {f"GSB_{name}": _label_of(pair, (name,)) if is_asked(name) else "invalid" for name in DIMENSIONS}
    genai = {"left_video_path": path_a, "right_video_path": path_b}
    genai |= {"left_model": clip_a.generator, "right_model": clip_b.generator, "prompt": pair.prompt}
    single = [{"video_path": video_path(c), "prompt": pair.prompt, "video_fps": c.nuisance.fps} for c in pair.clips]
    return {
        "tabench": [{"video_A": path_a, "video_B": path_b, "prompt": pair.prompt, "answer": pair.true_label}],
        "videoalign": [{**two_sided, **details, **groups, "Overall": pair.true_label}],
        "genai": [{**genai, "vote_type": GENAI_VOTES[pair.true_label]}],
        "react": [{**two_sided, "GSB_overall": pair.true_label, **by_dimension}],
        "videofeedback": single,
    }


def build_tables(pairs: dict[str, Sequence[Pair]], judge_problem: Callable[[str], str]) -> dict[str, list[Row]]:
    """Rows by file name. `pairs`: by split. `judge_problem` turns a prompt into the judge's `problem`.

    HELD_OUT_FILE is written only if there is a held-out split besides "eval".
    """
    tables: dict[str, list[Row]] = {}
    for split in ("train", "eval"):
        of_split = [(pair, judge_problem(pair.prompt)) for pair in pairs.get(split, ())]
        if of_split:
            tables[f"{split}.csv"] = [training_row(*item) for item in of_split]
            tables[f"{split}_rl.csv"] = [rl_row(*item) for item in of_split]
    for pair in pairs.get("eval", ()):
        for name, rows in bench_rows(pair).items():
            tables.setdefault(f"bench_{name}.csv", []).extend(rows)
    if pairs.keys() & HELD_OUT_SETS.keys() > {"eval"}:
        tables[HELD_OUT_FILE] = [
            {**bench_rows(pair)["tabench"][0], "answer": rl_row(pair, "")["answer"], "set": name}
            for split, name in HELD_OUT_SETS.items()
            for pair in pairs.get(split, ())
        ]
    return tables


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV under a temporary name, then rename it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, as strings."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
