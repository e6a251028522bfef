"""The CSV files: pairs as rows of the training, evaluation and benchmark formats, and the way back for checking them.

Benchmark labels, all free of noise: the preference itself (`answer`, `Overall`, `vote_type`, `GSB_overall`), and for
videoalign VQ from style, MQ from dynamics and camera, TA from subject and environment, by the sum of the sub-scores.
react has a label for every dimension, "invalid" where the prompt does not mention it.

The file of all held-out sets is in tabench's columns, its `answer` with the true sub-scores as in stage 2, and has a
column `set` beside: in_domain, new_combinations (the evaluation pairs) or new_rendering.
"""

import ast
import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .judge import parse_scores
from .scene import DIMENSIONS, NOT_ASKED, overall_score, prefer
from .world import COMPARED_SPLITS, LABELS, SPLITS, Clip, Pair

Row = dict[str, object]

BENCH_GROUPS = {"VQ": ("style",), "MQ": ("dynamics", "camera"), "TA": ("subject", "environment")}
GENAI_VOTES = {"A": "leftvote", "B": "rightvote", "same": "tievote"}
HELD_OUT_FILE = "bench_held_out.csv"
HELD_OUT_SETS = {"in_domain": "in_domain", "eval": "new_combinations", "new_rendering": "new_rendering"}
PATH_COLUMNS = ("video_A", "video_B", "path_A", "path_B", "left_video_path", "right_video_path", "video_path")
SHARE_TOLERANCE = 4.0  # standard errors between an intended and a measured share


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
    }


def rl_row(pair: Pair, problem: str) -> Row:
    """A row of the stage 2 format."""
    return {"videos": str([video_path(clip) for clip in pair.clips]), "problem": problem, "answer": _annotation(pair)}


def _annotation(pair: Pair) -> str:
    """An `answer` with the true sub-scores of both clips and the label of the pair."""
    scores = {f"video_{number}_scores": clip.scores for number, clip in enumerate(pair.clips, start=1)}
    return f"<answer>{json.dumps({**scores, 'gsb_result': pair.label})}</answer>"


def tabench_row(pair: Pair) -> Row:
    path_a, path_b = map(video_path, pair.clips)
    return {"video_A": path_a, "video_B": path_b, "prompt": pair.prompt, "answer": pair.true_label}


def held_out_row(pair: Pair) -> Row:
    """A row of HELD_OUT_FILE."""
    return {**tabench_row(pair), "answer": _annotation(pair), "set": HELD_OUT_SETS[pair.split]}


def _two_sided(pair: Pair) -> Row:
    clip_a, clip_b = pair.clips
    paths = {"path_A": video_path(clip_a), "path_B": video_path(clip_b)}
    return {**paths, "A_model": clip_a.generator, "B_model": clip_b.generator, "prompt": pair.prompt}


def _label_of(pair: Pair, dimensions: tuple[str, ...]) -> str:
    """The label by the plain sum of some sub-scores."""
    sums = [sum(clip.scores[name] for name in dimensions if clip.scores[name] != NOT_ASKED) for clip in pair.clips]
    return "same" if sums[0] == sums[1] else "A" if sums[0] > sums[1] else "B"


def videoalign_row(pair: Pair) -> Row:
    row = _two_sided(pair)
    for side, clip in zip("AB", pair.clips, strict=True):
        row |= {f"fps_{side}": clip.nuisance.fps, f"num_frames_{side}": clip.nuisance.num_frames}
    labels = {name: _label_of(pair, group) for name, group in BENCH_GROUPS.items()}
    return {**row, **labels, "Overall": pair.true_label}


def genai_row(pair: Pair) -> Row:
    clip_a, clip_b = pair.clips
    paths = {"left_video_path": video_path(clip_a), "right_video_path": video_path(clip_b)}
    models = {"left_model": clip_a.generator, "right_model": clip_b.generator}
    return {**paths, **models, "prompt": pair.prompt, "vote_type": GENAI_VOTES[pair.true_label]}


def react_row(pair: Pair) -> Row:
    labels = {
        f"GSB_{name}": _label_of(pair, (name,)) if name in pair.request.mentioned else "invalid" for name in DIMENSIONS
    }
    return {**_two_sided(pair), "GSB_overall": pair.true_label, **labels}


def videofeedback_rows(pair: Pair) -> list[Row]:
    """One row per clip: this benchmark has no pairs."""
    return [
        {"video_path": video_path(clip), "prompt": pair.prompt, "video_fps": clip.nuisance.fps} for clip in pair.clips
    ]


def build_tables(pairs: dict[str, Sequence[Pair]], judge_problem: Callable[[str], str]) -> dict[str, list[Row]]:
    """All CSV files by name. `judge_problem` turns a prompt into the judge's `problem`.

    `pairs` by split; HELD_OUT_FILE is there when one of the COMPARED_SPLITS is.
    """
    tables: dict[str, list[Row]] = {}
    if any(pairs.get(split) for split in COMPARED_SPLITS):
        tables[HELD_OUT_FILE] = [held_out_row(pair) for split in HELD_OUT_SETS for pair in pairs.get(split, ())]
    for split in (split for split in SPLITS if split in pairs):
        of_split = pairs[split]
        tables[f"{split}.csv"] = [training_row(pair, judge_problem(pair.prompt)) for pair in of_split]
        tables[f"{split}_rl.csv"] = [rl_row(pair, judge_problem(pair.prompt)) for pair in of_split]
    held_out = pairs["eval"]
    makers = {"tabench": tabench_row, "videoalign": videoalign_row, "genai": genai_row, "react": react_row}
    for name, maker in makers.items():
        tables[f"bench_{name}.csv"] = [maker(pair) for pair in held_out]
    tables["bench_videofeedback.csv"] = [row for pair in held_out for row in videofeedback_rows(pair)]
    return tables


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes a CSV under a temporary name, then renames it."""
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


def referenced_videos(row: dict[str, str]) -> list[str]:
    """The clips' paths in a row of any of the formats."""
    if "videos" in row:
        return ast.literal_eval(row["videos"])
    return [row[column] for column in PATH_COLUMNS if column in row]


def check_tables(output: Path, tables: dict[str, list[Row]], *, label_noise: float, malformed_share: float) -> None:
    """Reads the CSV files again. Raises ValueError when one is not what was written or contradicts another.

    Labels may differ from the scores' preference, and CoTs may fail to parse, as often as stated up to sampling error.
    """
    for name, rows in tables.items():
        expected = [{column: str(value) for column, value in row.items()} for row in rows]
        if read_table(output / name) != expected:
            raise ValueError(f"{output / name} does not read back as it was written")
        for row in expected:
            for path in referenced_videos(row):
                if not (output / path).is_file():
                    raise ValueError(f"{output / name} names {path}, which does not exist")
    for split, noise in (("train", label_noise), ("eval", 0.0)):
        rows, rl_rows = (read_table(output / name) for name in (f"{split}.csv", f"{split}_rl.csv"))
        flips = [_check_pair(f"{split} pair {i}", *both) for i, both in enumerate(zip(rows, rl_rows, strict=True))]
        _check_share(f"{split} labels against the scores", flips, noise)
        unusable = [parse_scores(row[column]) is None for row in rows for column in ("CoT_A", "CoT_B")]
        _check_share(f"{split} CoTs that do not parse", unusable, malformed_share)


def _check_pair(name: str, row: dict[str, str], rl_row: dict[str, str]) -> bool:
    """Whether the label of a pair contradicts its true scores; ValueError when the two rows contradict each other."""
    answer = json.loads(rl_row["answer"].removeprefix("<answer>").removesuffix("</answer>"))
    scores = [answer["video_1_scores"], answer["video_2_scores"]]
    if answer["gsb_result"] != row["GSB"] or row["GSB"] not in LABELS:
        raise ValueError(f"{name}: labels {row['GSB']!r} and {answer['gsb_result']!r}")
    if (row["videos"], row["problem"]) != (rl_row["videos"], rl_row["problem"]):
        raise ValueError(f"{name}: the two files disagree about its videos or its problem")
    for side, values in zip("AB", scores, strict=True):
        if abs(float(row[f"MOS_{side}_GSB"]) - overall_score(values)) > 1e-3:
            raise ValueError(f"{name}: MOS_{side}_GSB is not the overall score of {values}")
    return prefer(*scores) != row["GSB"]


def _check_share(what: str, outcomes: Sequence[bool], intended: float) -> None:
    """Raise ValueError when a share is further from the intended one than chance explains."""
    share = sum(outcomes) / len(outcomes)
    tolerance = SHARE_TOLERANCE * (intended * (1 - intended) / len(outcomes)) ** 0.5 + 1 / len(outcomes)
    if abs(share - intended) > (tolerance if intended else 0):
        raise ValueError(f"{what}: a share of {share:.3f}, where {intended:.3f} was asked for")
