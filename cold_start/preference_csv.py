"""The preference CSV: reading it, and every check that needs no model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from descore.answers import parse_label
from descore.checked import check_all, digest
from descore.csv_table import CsvError, CsvRow, CsvTable, parse_two_paths, parse_two_seconds, row_of, shorten
from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder, judge_problem
from utils import exchange, get_rank, get_world_size
from vision_process import VideoBudget, VideoHeader, probe_videos

PREFERENCES = {"A": 1, "B": -1, "same": 0}
INVALID_LABEL = "invalid"
LABEL_OF = {preference: label for label, preference in PREFERENCES.items()} | {None: INVALID_LABEL}
LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
DURATION_TOLERANCE_SECONDS = 0.5


@dataclass(frozen=True)
class Judgement:
    """What annotators said about a pair in one dimension.

    `label`: A, B, same or invalid, whatever words the CSV uses for it. Opinion scores are NaN where not given.
    """

    label: str
    score_a: float = math.nan
    score_b: float = math.nan


@dataclass(frozen=True)
class PreferencePair:
    """One row of the CSV. `row` counts data rows from 1; video paths are absolute; a judgement per label column."""

    row: int
    video_a: str
    video_b: str
    problem: str
    cot_a: str
    cot_b: str
    judgements: tuple[Judgement, ...]
    durations: tuple[float, float] | None

    @property
    def label(self) -> str:
        """That of the first dimension."""
        return self.judgements[0].label


@dataclass(frozen=True)
class CsvNeeds:
    """What a CSV must hold besides videos and problem: which label columns, whether scores, whether CoTs.

    Where there are several label columns, an empty cell is as `invalid`. `agreeing_scores`: no row may give the video
    that it prefers the lower score.
    """

    eval_dim: Sequence[str] = ("GSB",)
    scores: bool = False
    agreeing_scores: bool = False
    cots: bool = True


def read_pairs(path: str | Path, needs: CsvNeeds) -> list[PreferencePair]:
    """Read and check a preference CSV, without opening videos. Raises CsvError that lists every fault."""
    pairs, problems = _scan_rows(path, needs)
    require_clean(path, problems)
    return pairs


def load_checked_pairs(
    path: str | Path,
    needs: CsvNeeds,
    budget: VideoBudget,
    *,
    builder: SequenceBuilder | None,
    max_length: int,
    should_decode: bool = False,
) -> list[PreferencePair]:
    """Read a CSV and check rows, videos and, with a `builder`, texts and lengths. A collective.

    Each rank opens the videos of its share of the rows: their first frame, or with `should_decode` all frames that
    training would use. Raises CsvError that lists the faults of all rows, on every rank.
    """
    pairs, problems = _scan_rows(path, needs)
    rank = get_rank()
    mine = pairs[rank :: get_world_size()]
    headers, of_mine = _scan_videos(mine, budget, should_decode=should_decode, is_quiet=rank != 0)
    if builder is not None:
        of_mine += _scan_sequences(mine, headers, builder, budget, max_length=max_length, is_quiet=rank != 0)
    problems += [problem for answer in exchange(json.dumps(of_mine)) for problem in json.loads(answer)]
    require_clean(path, sorted(problems, key=row_of))
    return pairs


def require_clean(path: str | Path, problems: Sequence[str]) -> None:
    """Raise CsvError when there are problems."""
    if problems:
        raise CsvError(path, problems)


def _scan_rows(path: str | Path, needs: CsvNeeds) -> tuple[list[PreferencePair], list[str]]:
    """The valid rows of a CSV and the faults of the others. Raises CsvError when the file itself cannot be read."""
    table = CsvTable(path)
    required = ["videos", *needs.eval_dim]
    required += ["CoT_A", "CoT_B"] if needs.cots else []
    required += [f"MOS_{side}_{name}" for name in needs.eval_dim for side in "AB"] if needs.scores else []
    required += [] if "prompt" in table.columns else ["problem"]
    table.require(required)
    folder = Path(path).resolve().parent
    return list(table.parse(lambda row: _parse_row(row, folder, needs))), table.problems


def _parse_row(row: CsvRow, folder: Path, needs: CsvNeeds) -> PreferencePair:
    cells = row.cells
    video_a, video_b = parse_two_paths(cells["videos"], "videos")
    judgements = tuple(_parse_judgement(cells, name, needs) for name in needs.eval_dim)
    cots = [cells.get(f"CoT_{side}", "") for side in "AB"]
    if needs.cots and not all(cot.strip() for cot in cots):
        raise ValueError("a CoT is empty; fill CoT_A and CoT_B, or mask every CoT with --drop_prob 1")
    problem, prompt = (cells.get(column, "").strip() for column in ("problem", "prompt"))
    if not problem and not prompt:
        raise ValueError("problem is empty; write the instruction of the judge, or a prompt for the built-in one")
    durations = cells.get("durations", "")
    return PreferencePair(
        row=row.number,
        video_a=str(folder / video_a),
        video_b=str(folder / video_b),
        problem=problem or judge_problem(prompt),
        cot_a=cots[0],
        cot_b=cots[1],
        judgements=judgements,
        durations=parse_two_seconds(durations, "durations") if durations.strip() else None,
    )


def _parse_judgement(cells: Mapping[str, str], name: str, needs: CsvNeeds) -> Judgement:
    """The label in column `name`, and its opinion scores."""
    if len(needs.eval_dim) > 1 and not cells[name].strip():
        return Judgement(INVALID_LABEL)
    try:
        label = LABEL_OF[parse_label(cells[name])]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    scores = [_parse_score(cells, f"MOS_{side}_{name}", is_needed=needs.scores) for side in "AB"]
    if needs.agreeing_scores and PREFERENCES.get(label, 0) * (scores[0] - scores[1]) < 0:
        raise ValueError(
            f"{name} is {label!r} and its scores {scores[0]:g} and {scores[1]:g} say the opposite, which "
            "--loss_type scaled cannot learn from; correct them, remove the row or choose another loss"
        )
    return Judgement(label, *scores)


def _parse_score(cells: Mapping[str, str], name: str, *, is_needed: bool) -> float:
    text = cells.get(name, "")
    if not text.strip():
        if is_needed:
            raise ValueError(f"{name} is empty; this loss needs a score from 1 to 5")
        return math.nan
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
        raise ValueError(f"{name} is {shorten(text)!r}; write a number from 1 to 5, or leave it empty")
    return score


def _scan_videos(
    pairs: Sequence[PreferencePair], budget: VideoBudget, *, should_decode: bool, is_quiet: bool
) -> tuple[dict[str, VideoHeader], list[str]]:
    """Open every distinct video: headers of the good ones by path, and the faults with their rows."""
    paths = [path for pair in pairs for path in (pair.video_a, pair.video_b)]
    found = probe_videos(paths, budget, should_decode=should_decode, is_quiet=is_quiet)
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


def _scan_sequences(
    pairs: Sequence[PreferencePair],
    headers: dict[str, VideoHeader],
    builder: SequenceBuilder,
    budget: VideoBudget,
    *,
    max_length: int,
    is_quiet: bool,
) -> list[str]:
    """Faults of texts (reserved tokens) and sequences (over `max_length`); videos without a header are skipped."""

    def count_tokens(text: tuple[str, str, VideoHeader]) -> int:
        problem, cot, header = text
        length = builder.count_prompt_tokens(problem, header, budget)
        return length + len(builder.encode_cot(cot)) + NUM_CLOSING_TOKENS

    sides = [
        (f"row {pair.row}, video {side}", (pair.problem, cot, headers[path]))
        for pair in pairs
        for side, path, cot in (("A", pair.video_a, pair.cot_a), ("B", pair.video_b, pair.cot_b))
        if path in headers
    ]
    lengths = check_all(
        (text for _, text in sides),
        count_tokens,
        key=lambda text: digest("tokens", builder.fingerprint, budget, text),
        description="texts",
        is_quiet=is_quiet,
    )
    problems = []
    for name, text in sides:
        length = lengths[text]
        if isinstance(length, ValueError):
            problems.append(f"{name}: {length}")
        elif length > max_length:
            remedy = "raise --max_length, lower --fps or --max_frame_pixels, or remove the row"
            problems.append(f"{name}: {length} tokens, over --max_length {max_length}; {remedy}")
    return problems
