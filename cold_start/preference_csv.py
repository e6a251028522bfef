"""The preference CSV: reading it, and every check that can be made before a model is loaded."""

import ast
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder, judge_problem
from vision_process import VideoBudget, VideoError, VideoHeader, load_video, probe_video

PREFERENCES = {"A": 1, "B": -1, "same": 0}
INVALID_LABEL = "invalid"
LABELS = (*PREFERENCES, INVALID_LABEL)
NUM_PROBLEMS_SHOWN = 20
DURATION_TOLERANCE_SECONDS = 0.5
PROBE_THREADS = 8


class CsvError(ValueError):
    """Faults of a CSV, with file, row and remedy. `problems` holds one line per fault."""

    def __init__(self, path: str | Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = len(problems) - NUM_PROBLEMS_SHOWN
        lines = [f"{path}: {len(problems)} fault(s)", *(f"  {line}" for line in problems[:NUM_PROBLEMS_SHOWN])]
        super().__init__("\n".join(lines + ([f"  ... and {more} more"] if more > 0 else [])))


@dataclass(frozen=True)
class PreferencePair:
    """One row of the CSV. `row` counts data rows from 1; video paths are absolute; scores are NaN where not given."""

    row: int
    video_a: str
    video_b: str
    problem: str
    cot_a: str
    cot_b: str
    label: str
    score_a: float
    score_b: float
    durations: tuple[float, float] | None


@dataclass(frozen=True)
class CsvNeeds:
    """What a use of the CSV requires beyond videos and problem: which label column, scores, CoTs.

    `agreeing_scores`: no row may have a preference and a lower score for the video that it prefers.
    """

    eval_dim: str = "GSB"
    scores: bool = False
    agreeing_scores: bool = False
    cots: bool = True


def read_pairs(path: str | Path, needs: CsvNeeds) -> list[PreferencePair]:
    """Read and check a preference CSV (without opening videos). Raises CsvError that lists every fault."""
    pairs, problems = scan_rows(path, needs)
    require_clean(path, problems)
    return pairs


def require_clean(path: str | Path, problems: Sequence[str]) -> None:
    """Raise CsvError when there are problems."""
    if problems:
        raise CsvError(path, problems)


def scan_rows(path: str | Path, needs: CsvNeeds) -> tuple[list[PreferencePair], list[str]]:
    """The sound rows of a CSV and the faults of the others. Raises CsvError when the file itself cannot be used."""
    table = _read_table(path)
    required = ["videos", needs.eval_dim]
    required += ["CoT_A", "CoT_B"] if needs.cots else []
    required += [f"MOS_{side}_{needs.eval_dim}" for side in "AB"] if needs.scores else []
    missing = [name for name in required if name not in table.columns]
    if "problem" not in table.columns and "prompt" not in table.columns:
        missing.append("problem (or prompt)")
    if missing:
        has = ", ".join(table.columns)
        raise CsvError(path, [f"missing column {name}; the file has {has}" for name in missing])
    folder = Path(path).resolve().parent
    problems: list[str] = []
    pairs: list[PreferencePair] = []
    for index, cells in enumerate(table.to_dict("records")):
        try:
            pairs.append(_parse_row(index + 1, cells, folder, needs))
        except ValueError as error:
            problems.append(f"row {index + 1}: {error}")
    return pairs, problems


def _read_table(path: str | Path) -> pd.DataFrame:
    if not Path(path).is_file():
        raise CsvError(path, ["file not found; give the path of a CSV"])
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CsvError(path, [f"not a readable UTF-8 CSV: {error}; save it again as UTF-8 CSV"]) from error
    if table.empty:
        raise CsvError(path, ["no rows; add at least one pair"])
    return table


def _parse_row(row: int, cells: dict[str, str], folder: Path, needs: CsvNeeds) -> PreferencePair:
    video_a, video_b = _parse_two(cells["videos"], "videos", "two paths")
    label = cells[needs.eval_dim].strip()
    if label not in LABELS:
        raise ValueError(f"{needs.eval_dim} is {label!r}; write one of {', '.join(LABELS)}")
    cots = [cells.get(f"CoT_{side}", "") for side in "AB"]
    if needs.cots and not all(cot.strip() for cot in cots):
        raise ValueError("an empty CoT; fill CoT_A and CoT_B or mask every CoT with --drop_prob 1")
    scores = [_parse_score(cells.get(f"MOS_{side}_{needs.eval_dim}", ""), side, needs) for side in "AB"]
    if needs.agreeing_scores and PREFERENCES.get(label, 0) * (scores[0] - scores[1]) < 0:
        raise ValueError(
            f"{needs.eval_dim} is {label!r} and its scores {scores[0]:g} and {scores[1]:g} say the opposite, which "
            "--loss_type scaled cannot learn from; correct them, remove the row or take another loss"
        )
    return PreferencePair(
        row=row,
        video_a=str(folder / str(video_a)),
        video_b=str(folder / str(video_b)),
        problem=_parse_problem(cells),
        cot_a=cots[0],
        cot_b=cots[1],
        label=label,
        score_a=scores[0],
        score_b=scores[1],
        durations=_parse_durations(cells.get("durations", "")),
    )


def _parse_problem(cells: dict[str, str]) -> str:
    """The judge's instruction; without one, the built-in judge prompt around the text prompt."""
    problem, prompt = (cells.get(column, "").strip() for column in ("problem", "prompt"))
    if not problem and not prompt:
        raise ValueError("problem is empty; write the instruction of the judge, or a prompt for the built-in one")
    return problem or judge_problem(prompt)


def _parse_durations(text: str) -> tuple[float, float] | None:
    if not text.strip():
        return None
    first, second = _parse_two(text, "durations", "two numbers")
    try:
        return float(first), float(second)
    except (TypeError, ValueError) as error:
        raise ValueError(f"durations is {text!r}; write two numbers, such as [2.0, 2.0], or leave it empty") from error


def _parse_two(text: str, column: str, what: str) -> tuple:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{column} is {text!r}; write a list of {what}, such as ['a.mp4', 'b.mp4']") from error
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{column} is {text!r}; it must list {what}")
    return tuple(value)


def _parse_score(text: str, side: str, needs: CsvNeeds) -> float:
    name = f"MOS_{side}_{needs.eval_dim}"
    if not text.strip():
        if needs.scores:
            raise ValueError(f"{name} is empty; this loss needs a score from 1 to 5")
        return math.nan
    try:
        score = float(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; write a number") from error
    if not math.isfinite(score):
        raise ValueError(f"{name} is {text!r}; write a number from 1 to 5, or leave it empty")
    return score


def probe_videos(
    paths: Sequence[str], budget: VideoBudget, *, should_decode: bool = False
) -> dict[str, VideoHeader | VideoError]:
    """Header, or what is wrong, of each distinct video; all frames are decoded only with `should_decode`."""
    paths = list(dict.fromkeys(paths))

    def probe(path: str) -> VideoHeader | VideoError:
        try:
            header = probe_video(path, min_frames=budget.min_frames)
            if should_decode:
                load_video(path, budget)
            return header
        except VideoError as error:
            return error

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        return dict(zip(paths, tqdm(pool.map(probe, paths), total=len(paths), desc="videos"), strict=True))


def scan_videos(
    pairs: Sequence[PreferencePair], budget: VideoBudget, *, should_decode: bool = False
) -> tuple[dict[str, VideoHeader], list[str]]:
    """Open every distinct video: headers of the sound ones by path, and the faults with their rows.

    Only the first frame is decoded, or with `should_decode` all frames that training would use.
    """
    paths = [path for pair in pairs for path in (pair.video_a, pair.video_b)]
    found = probe_videos(paths, budget, should_decode=should_decode)
    headers = {path: header for path, header in found.items() if isinstance(header, VideoHeader)}
    problems = []
    for pair in pairs:
        for side, path in enumerate((pair.video_a, pair.video_b)):
            if path not in headers:
                problems.append(f"row {pair.row}: {found[path]}; replace the file or remove the row")
            elif pair.durations and pair.durations[side] - headers[path].duration > DURATION_TOLERANCE_SECONDS:
                stated = f"{pair.durations[side]:.2f} s in durations, {headers[path].duration:.2f} s in the file"
                problems.append(f"row {pair.row}: video is shorter than stated ({stated}), truncated?: {path}")
    return headers, problems


def scan_sequences(
    pairs: Sequence[PreferencePair],
    headers: dict[str, VideoHeader],
    builder: SequenceBuilder,
    budget: VideoBudget,
    *,
    max_length: int,
) -> list[str]:
    """Faults of texts (reserved tokens) and sequences (over `max_length`); videos without header are passed over."""
    problems = []
    for pair in pairs:
        for side, path, cot in (("A", pair.video_a, pair.cot_a), ("B", pair.video_b, pair.cot_b)):
            if path not in headers:
                continue
            try:
                length = builder.count_prompt_tokens(pair.problem, headers[path], budget)
                length += len(builder.encode_cot(cot)) + NUM_CLOSING_TOKENS
            except ValueError as error:
                problems.append(f"row {pair.row}, video {side}: {error}")
                continue
            if length > max_length:
                remedy = "raise --max_length, lower --fps or --max_frame_pixels, or remove the row"
                excess = f"{length} tokens, over --max_length {max_length}"
                problems.append(f"row {pair.row}, video {side}: {excess}; {remedy}")
    return problems
