"""What a run has to do, and everything that can be checked before a model is loaded or asked."""

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infer_utils.cot_answers import read_opinions
from infer_utils.cot_journal import Sample, SampleKey
from infer_utils.cot_selection import read_rubric
from infer_utils.cot_table import CsvTable, read_table
from preference_csv import CsvNeeds, PreferencePair, probe_videos, read_pairs, require_clean
from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder
from vision_process import VideoBudget, VideoError, VideoHeader

SIDES = ("A", "B")
COT_COLUMNS = ("CoT_A", "CoT_B")
SEED_BYTES = 4
"""Seeds are non-negative 31-bit integers, which every server takes."""


@dataclass(frozen=True)
class Sampling:
    """How chains of thought (CoTs) are drawn. `max_tokens`: of one CoT, its EOS included."""

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def validate(self) -> None:
        """Raise ValueError on values outside their range."""
        if self.num_samples < 1 or self.max_tokens < 1:
            raise ValueError("--num_samples and --max_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("--temperature must not be negative, and --top_p lie above 0 and at most at 1")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("--temperature 0 gives the same CoT each time: add --num_samples 1, or raise it")

    def seed_of(self, key: SampleKey) -> int:
        """The seed of one sample's draws; it depends on the run's seed and on the sample's place in the CSV only."""
        text = f"{self.seed}/{key.row}/{key.side}/{key.sample}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=SEED_BYTES).digest()) >> 1


@dataclass(frozen=True)
class VideoJob:
    """A video to think about: its samples with these numbers.

    `num_prompt_tokens`: of the prompt as training has it, the video included.
    """

    row: int
    side: str
    video: str
    problem: str
    num_prompt_tokens: int
    samples: tuple[int, ...]

    @property
    def keys(self) -> tuple[SampleKey, ...]:
        return tuple(SampleKey(self.row, self.side, sample) for sample in self.samples)


@dataclass(frozen=True)
class VideoFailure:
    """A video that cannot be thought about, or no further, and why."""

    row: int
    side: str
    message: str


class CotSource(Protocol):
    """What writes CoTs: a model in this process, or a server."""

    def check(self) -> int | None:
        """Check what can be without loading the model; most tokens of a prompt and its CoT, None if it does not tell.

        Raises ValueError that says how to put it right.
        """

    def collect(self, jobs: Sequence[VideoJob]) -> Iterator[Sample | VideoFailure]:
        """The samples of all jobs, each as soon as it is there, in any order.

        Raises ValueError when the run cannot go on; what was given before remains good.
        """


@dataclass(frozen=True)
class CollectInput:
    """A CSV as pairs with absolute video paths, and cell by cell."""

    path: str
    table: CsvTable
    pairs: tuple[PreferencePair, ...]

    @property
    def has_relative_videos(self) -> bool:
        """Whether a video path depends on where the CSV lies."""
        cells = (self.table.cells(pair.row)["videos"] for pair in self.pairs)
        return any(not os.path.isabs(video) for cell in cells for video in ast.literal_eval(cell))


@dataclass(frozen=True)
class CollectPlan:
    """What is to be done with a CSV.

    `kept_rows`: rows whose CoTs stay as they are. `jobs`: both videos of every other row, unless one of them is
    in `failures`.
    """

    data: CollectInput
    kept_rows: frozenset[int]
    jobs: tuple[VideoJob, ...]
    failures: tuple[VideoFailure, ...]


@dataclass(frozen=True)
class PromptCheck:
    """How prompts are built, and how long they may be.

    `max_length`: tokens of a training sequence. `max_model_len`: tokens of a prompt and its CoT, None for no limit.
    """

    builder: SequenceBuilder
    budget: VideoBudget
    max_length: int
    max_model_len: int | None


def read_input(path: str, *, eval_dim: str) -> CollectInput:
    """Read a CSV. Raises CsvError that lists what is wrong with its rows; videos are not looked at."""
    pairs, table = read_pairs(path, CsvNeeds(eval_dim=eval_dim, cots=False)), read_table(path)
    assert len(pairs) == len(table.rows), f"{path} reads as {len(pairs)} and as {len(table.rows)} rows"
    return CollectInput(path, table, tuple(pairs))


def make_plan(data: CollectInput, check: PromptCheck, sampling: Sampling, *, should_replace: bool) -> CollectPlan:
    """Check files and prompts, and decide what is to be sampled. Raises CsvError that lists every fault.

    A file that is there but does not decode is no fault of the CSV: its row is left without CoTs. `should_replace`:
    think again about rows that have both CoTs.
    """
    kept_rows = frozenset(p.row for p in data.pairs if not should_replace and p.cot_a.strip() and p.cot_b.strip())
    wanted = [pair for pair in data.pairs if pair.row not in kept_rows]
    if not wanted:
        raise ValueError(f"every row of {data.path} has both CoTs; write new ones with --replace_cots")
    require_clean(data.path, [*_missing_files(wanted), *_bad_opinions(data)])
    found = probe_videos([video for pair in wanted for _, video in _videos(pair)], check.budget)
    failures = [
        VideoFailure(pair.row, side, str(found[video]))
        for pair in wanted
        for side, video in _videos(pair)
        if isinstance(found[video], VideoError)
    ]
    failed_rows = {failure.row for failure in failures}
    jobs: list[VideoJob] = []
    problems: list[str] = []
    for pair in wanted:
        for side, video in _videos(pair) if pair.row not in failed_rows else ():
            try:
                length = _count_tokens(check, pair.problem, found[video], sampling.max_tokens)
            except ValueError as error:
                problems.append(f"row {pair.row}, video {side}: {error}")
                continue
            jobs.append(VideoJob(pair.row, side, video, pair.problem, length, tuple(range(sampling.num_samples))))
    require_clean(data.path, problems)
    return CollectPlan(data, kept_rows, tuple(jobs), tuple(failures))


def _videos(pair: PreferencePair) -> Iterable[tuple[str, str]]:
    return zip(SIDES, (pair.video_a, pair.video_b), strict=True)


def _missing_files(pairs: Sequence[PreferencePair]) -> list[str]:
    return [
        f"row {pair.row}: video not found: {video}; correct the path or remove the row"
        for pair in pairs
        for _, video in _videos(pair)
        if not Path(video).is_file()
    ]


def _bad_opinions(data: CollectInput) -> list[str]:
    problems = []
    for pair in data.pairs:
        try:
            read_opinions(data.table.cells(pair.row), read_rubric(pair.problem))
        except ValueError as error:
            problems.append(f"row {pair.row}: {error}")
    return problems


def _count_tokens(check: PromptCheck, problem: str, header: VideoHeader, max_tokens: int) -> int:
    """Tokens of a prompt. Raises ValueError for reserved tokens in it, and when a CoT has no room after it."""
    length = check.builder.count_prompt_tokens(problem, header, check.budget)
    if length + NUM_CLOSING_TOKENS >= check.max_length:
        raise ValueError(f"a prompt of {length} tokens leaves no room for a CoT under --max_length {check.max_length}")
    if check.max_model_len is not None and length + max_tokens > check.max_model_len:
        raise ValueError(
            f"a prompt of {length} tokens and a CoT of {max_tokens} exceed the {check.max_model_len} that the model "
            "takes; lower --max_tokens, --fps or --max_pixels, or remove the row"
        )
    return length
