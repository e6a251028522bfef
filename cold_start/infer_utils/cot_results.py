"""What a run leaves: the journal of its samples, the rows of its CSV, and its report.

The journal has one JSON line per sample, written the moment the sample is finished. A killed run leaves whole lines
and at most one torn one, which is dropped; the next run draws what is missing. The first line says what the samples
depend on, so that those of another run are never mixed in. Failures are not kept: a repaired video is tried again.
"""

import fcntl
import json
import logging
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from infer_utils.cot_engines import Sample, SampleKey, VideoFailure, VideoJob
from infer_utils.cot_selection import (
    Judgement,
    Malformed,
    PairChoice,
    Scores,
    build_answer,
    choose_pair,
    read_judgement,
    read_opinions,
)
from preference_csv import PreferencePair
from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder

logger = logging.getLogger(__name__)

NUM_ROWS_SHOWN = 10
ANSWER_COLUMN = "answer"
Judged = Sequence[Judgement | Malformed]


class CotJournal:
    """The open journal of a run, a context manager. Texts stay on disk: `read`."""

    def __init__(self, path: Path, identity: Mapping[str, object], *, overwrite: bool = False) -> None:
        """Open or begin. `identity`: what samples depend on, as JSON values. `overwrite`: drop what is there.

        Raises ValueError if another process writes it, if it is not a journal, and for another identity.
        """
        self.path = path
        self._offsets: dict[SampleKey, int] = {}
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115, closed by __exit__
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._load(json.dumps({"identity": identity}).encode() + b"\n")
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> "CotJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: SampleKey) -> bool:
        return key in self._offsets

    def add(self, sample: Sample) -> None:
        """Note a sample."""
        assert sample.key not in self, f"{sample.key} was sampled twice"
        self._offsets[sample.key] = self._file.seek(0, os.SEEK_END)
        self._write(json.dumps(vars(sample)).encode() + b"\n")

    def read(self, key: SampleKey) -> Sample:
        """A sample, from disk."""
        self._file.seek(self._offsets[key])
        return Sample(**{**json.loads(self._file.readline()), "key": key})

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is in use by another run. Wait, or choose another --output.") from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s). Start no second run with this --output.", self.path, error)

    def _load(self, first_line: bytes) -> None:
        """Index the samples that are there; a new journal begins with `first_line`."""
        end = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n") and (end or first_line.startswith(line)):
                break  # torn
            try:
                entry = json.loads(line)
                if end:
                    self._offsets[SampleKey(*entry["key"])] = end
                else:
                    self._require_same(entry["identity"], json.loads(first_line)["identity"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                reason = f"{self.path} is not a journal of samples. Choose another --output, or add --overwrite."
                raise ValueError(reason) from error
            end += len(line)
        self._file.truncate(end)
        if not end:
            self._write(first_line)

    def _require_same(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if changed:
            each = ", ".join(f"{name} ({found.get(name)!r} there, {wanted.get(name)!r} now)" for name in changed)
            raise ValueError(
                f"{self.path} holds samples of another run, with another {each}. Choose another --output, or start "
                "again with --overwrite."
            )


@dataclass
class CollectReport:
    """Counts of a run, written beside its CSV. Rows are numbered from 1, as in the input.

    `videos`, `samples`: those with samples to choose from. `rows_disagreeing`: rows whose CoTs contradict the label.
    `rows_without_cots`: `row` and `reason`. `samples_with_another_prompt`: before which the server read a prompt of
    another length than training's. `failures`: videos without samples, or with fewer.
    """

    rows: int
    failures: Sequence[VideoFailure]
    rows_with_collected_cots: int = 0
    rows_with_kept_cots: int = 0
    rows_agreeing: int = 0
    rows_disagreeing: list[int] = field(default_factory=list)
    rows_without_cots: list[dict[str, object]] = field(default_factory=list)
    videos: int = 0
    samples: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    samples_with_another_prompt: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def format(self) -> str:
        """The report as lines for the console."""
        causes = "; ".join(f"{count} {cause}" for cause, count in self.malformed.most_common())
        num_invalid = self.rows_with_collected_cots - self.rows_agreeing - len(self.rows_disagreeing)
        shown = self.rows_without_cots[:NUM_ROWS_SHOWN]
        num_hidden = len(self.rows_without_cots) - len(shown)
        lines = [
            f"{self.videos} videos, {self.samples} samples, {self.malformed.total()} malformed ({causes or '-'})",
            f"{self.rows_with_collected_cots} rows got CoTs: {self.rows_agreeing} agree with their label, "
            f"{len(self.rows_disagreeing)} do not, {num_invalid} have an invalid one",
            f"{self.rows_with_kept_cots} rows keep the CoTs that they had",
            "answers: " + ", ".join(f"{count} from {source}" for source, count in self.answers.items()),
            f"{len(self.rows_without_cots)} of {self.rows} rows have no CoTs",
            *(f"  row {entry['row']}: {entry['reason']}" for entry in shown),
        ]
        if num_hidden:
            lines.append(f"  ... and {num_hidden} more, all in the report")
        if self.samples_with_another_prompt:
            lines.append(
                f"warning: before {self.samples_with_another_prompt} samples the server read a prompt of another "
                "length than training's. It takes other frames, or has another chat template (see --send_video)."
            )
        return "\n".join(lines)


@dataclass
class RowWriter:
    """Chooses CoTs and answers row by row, and counts in `report`. `options`: the command line."""

    options: Namespace
    builder: SequenceBuilder
    journal: CotJournal
    jobs: Mapping[tuple[int, str], VideoJob]
    report: CollectReport

    def fill(self, pair: PreferencePair, cells: Mapping[str, str]) -> dict[str, str] | None:
        """A row of the output; None if it is left out. `cells`: the row of the input."""
        if keeps_cots(pair, self.options):
            self.report.rows_with_kept_cots += 1
            cots = (pair.cot_a, pair.cot_b)  # of any form
            choice = self._choose(pair, [[read_judgement(cot, pair.problem)] for cot in cots])
        else:
            judged = [self._judge_video(pair.row, side) for side in "AB"]
            choice = self._choose(pair, judged)
            fault = self._find_fault(pair, judged, choice)
            self._count(pair, choice, fault)
            cots = ("", "") if fault else (choice.a.cot, choice.b.cot)
            choice = None if fault else choice
        if self.options.drop_incomplete and not any(cots):
            return None
        answer = self._write_answer(pair, cells, choice.confirmed_scores if choice else None)
        return {**cells, "CoT_A": cots[0], "CoT_B": cots[1], ANSWER_COLUMN: answer}

    def _choose(self, pair: PreferencePair, judged: Sequence[Judged]) -> PairChoice | None:
        return choose_pair(*judged, label=pair.label, tie_margin=self.options.tie_margin)

    def _judge_video(self, row: int, side: str) -> Judged:
        """What each sample of a video says."""
        job = self.jobs.get((row, side))
        samples = [self.journal.read(key) for key in job.keys if key in self.journal] if job else []
        judged = [self._judge(sample, job) for sample in samples]
        self.report.videos += bool(samples)
        self.report.samples += len(samples)
        self.report.malformed.update(found.value for found in judged if isinstance(found, Malformed))
        self.report.samples_with_another_prompt += sum(
            sample.num_prompt_tokens not in (None, job.num_prompt_tokens) for sample in samples
        )
        return judged

    def _judge(self, sample: Sample, job: VideoJob) -> Judgement | Malformed:
        """What a sample says, or why it is not used; stage 1 can train on whatever is used."""
        if not sample.is_finished:
            return Malformed.CUT
        try:
            num_tokens = len(self.builder.encode_cot(sample.text))
        except ValueError:
            return Malformed.RESERVED
        if job.num_prompt_tokens + num_tokens + NUM_CLOSING_TOKENS > self.options.max_length:
            return Malformed.TOO_LONG
        return read_judgement(sample.text, job.problem)

    def _find_fault(self, pair: PreferencePair, judged: Sequence[Judged], choice: PairChoice | None) -> str:
        """Why a row gets no CoTs; empty if it does."""
        if choice is None:
            errors = [f"video {f.video}: {f.error}" for f in self.report.failures if f.row == pair.row]
            causes = [f"video {side}: {explain(of)}" for side, of in zip("AB", judged, strict=True) if explain(of)]
            return "; ".join(errors or causes)  # an error says more
        if not self.options.require_agreement or choice.agrees is not False:
            return ""
        nearest = "" if choice.difference is None else f"; A minus B is {choice.difference:+.2f} at the nearest"
        return f"no pair of CoTs agrees with the label {pair.label}{nearest}"

    def _count(self, pair: PreferencePair, choice: PairChoice | None, fault: str) -> None:
        if fault:
            self.report.rows_without_cots.append({"row": pair.row, "reason": fault})
            return
        self.report.rows_with_collected_cots += 1
        self.report.rows_agreeing += choice.agrees is True
        if choice.agrees is False:
            self.report.rows_disagreeing.append(pair.row)

    def _write_answer(
        self, pair: PreferencePair, cells: Mapping[str, str], confirmed: tuple[Scores, Scores] | None
    ) -> str:
        """Stage 2's answer, counted by its source."""
        present, opinions = cells.get(ANSWER_COLUMN, ""), read_opinions(cells, pair.problem)
        if present.strip() and not self.options.replace_answers:
            self.report.answers["answers that were there"] += 1
            return present
        source = "label and CoTs that agree with it" if confirmed else "label only"
        self.report.answers["label and MOS columns" if opinions else source] += 1
        return build_answer(pair.label, opinions or confirmed)


def keeps_cots(pair: PreferencePair, options: Namespace) -> bool:
    """Whether a row's own CoTs stay."""
    return not options.replace_cots and bool(pair.cot_a.strip() and pair.cot_b.strip())


def explain(judged: Judged) -> str:
    """Why a video has no CoT to choose, if so. Example: none of 4 CoTs is well-formed: 4 empty."""
    if any(isinstance(found, Judgement) for found in judged):
        return ""
    counts = ", ".join(f"{count} {cause}" for cause, count in Counter(judged).items())
    return f"none of {len(judged)} CoTs is well-formed: {counts}" if judged else "no CoTs"
