"""The outputs of a run: the journal of its samples, the rows of its CSV, and its report.

The journal has one JSON line per sample, written as soon as the sample is finished. A killed run leaves whole lines
and at most one torn line, which is dropped; the next run samples what is missing. The first line says what the samples
depend on, so that runs are never mixed. Failures are not kept: a repaired video is tried again.
"""

import fcntl
import json
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collect.endpoint import Sample, SampleKey, VideoFailure, VideoJob
from collect.selection import Judged, Judgement, Scores, build_answer, choose_pair, read_judgement
from preference_csv import PreferencePair
from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder

logger = logging.getLogger(__name__)

NUM_ROWS_SHOWN = 10
ANSWER_COLUMN = "answer"


@dataclass(frozen=True)
class Row:
    """A row of the input. `cells`: raw text by column. `opinions`: sub-scores of A and B from the MOS columns.

    `keeps_cots`: whether its own CoTs stay.
    """

    pair: PreferencePair
    cells: Mapping[str, str]
    opinions: tuple[Scores, Scores] | None
    keeps_cots: bool


class CotJournal:
    """The open journal of a run, a context manager. `samples`: all recorded ones, by key."""

    def __init__(self, path: Path, identity: Mapping[str, object], *, overwrite: bool = False) -> None:
        """Open or create. `identity`: what samples depend on, as JSON values. `overwrite`: drop the contents.

        Raises ValueError if another process is writing to it, if it is not a journal, or if its identity differs.
        """
        self.path, self.samples = path, {}
        self._file = open(path, "a+b")  # noqa: SIM115, closed by __exit__
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._load(identity)
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> "CotJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Record a sample."""
        assert sample.key not in self.samples, f"{sample.key} was sampled twice"
        self.samples[sample.key] = sample
        self._write(vars(sample))

    def _write(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path} is in use by another run. Wait, or choose another --output.") from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s). Do not start a second run with it.", self.path, error)

    def _load(self, identity: Mapping[str, object]) -> None:
        """Read the recorded samples and cut off a torn line; a new journal gets its first line."""
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        try:
            if not lines and not json.dumps({"identity": identity}).encode().startswith(torn):
                raise TypeError("not the beginning of a first line")
            found = json.loads(lines[0])["identity"] if lines else None
            for entry in map(json.loads, lines[1:]):
                sample = Sample(**{**entry, "key": SampleKey(*entry["key"])})
                self.samples[sample.key] = sample
            changed = [name for name in {**found, **identity} if found.get(name) != identity[name]] if lines else []
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            reason = f"{self.path} is not a journal of samples. Choose another --output, or add --overwrite."
            raise ValueError(reason) from error
        if changed:
            each = ", ".join(f"{name} ({found.get(name)!r} there, {identity[name]!r} now)" for name in changed)
            remedy = "Choose another --output, or add --overwrite."
            raise ValueError(f"{self.path} holds samples of another run. These differ: {each}. {remedy}")
        self._file.truncate(self._file.tell() - len(torn))
        if not lines:
            self._write({"identity": identity})


@dataclass
class CollectReport:
    """Counts of a run, written beside its CSV. Rows count from 1, as in the input.

    `videos`, `samples`: the videos with samples, and their samples. `rows_disagreeing`: rows whose CoTs contradict the
    label. `rows_without_cots`: `row` and `reason`. `samples_with_another_prompt`: for which the server read a prompt
    of another length than training's. `failures`: videos for which sampling failed. `answers`: counts by source.
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
        lines = [
            f"{self.videos} videos, {self.samples} samples, {self.malformed.total()} malformed ({causes or '-'})",
            f"{self.rows_with_collected_cots} of {self.rows} rows got CoTs: {self.rows_agreeing} agree with their "
            f"label, {len(self.rows_disagreeing)} do not; {self.rows_with_kept_cots} keep those that they had",
            f"{len(self.rows_without_cots)} rows have no CoTs",
            *(f"  row {entry['row']}: {entry['reason']}" for entry in self.rows_without_cots[:NUM_ROWS_SHOWN]),
        ]
        if self.samples_with_another_prompt:
            lines.append(
                f"warning: before {self.samples_with_another_prompt} samples the server read a prompt of another "
                "length than training's. It takes other frames, or has another chat template (see --send_video)."
            )
        return "\n".join(lines)


def judge_samples(
    job: VideoJob | None, journal: CotJournal, builder: SequenceBuilder, max_length: int, report: CollectReport
) -> Judged:
    """What each sample of a video says, or why it is not used. Stage 1 can train on all that are used."""

    def judge(sample: Sample) -> Judgement | str:
        if not sample.is_finished:
            return "cut off before its end (--max_tokens)"
        try:
            num_tokens = len(builder.encode_cot(sample.text))
        except ValueError:
            return "a reserved token in the text"
        if job.num_prompt_tokens + num_tokens + NUM_CLOSING_TOKENS > max_length:
            return "too long for training (--max_length)"
        return read_judgement(sample.text, job.problem)

    samples = [journal.samples[key] for key in job.keys if key in journal.samples] if job else []
    judged = [judge(sample) for sample in samples]
    report.videos += bool(samples)
    report.samples += len(samples)
    report.malformed.update(found for found in judged if isinstance(found, str))
    report.samples_with_another_prompt += sum(
        sample.num_prompt_tokens not in (None, job.num_prompt_tokens) for sample in samples
    )
    return judged


def annotate(row: Row, judged: Sequence[Judged], options: Namespace, report: CollectReport) -> dict[str, str] | None:
    """The row with `CoT_A`, `CoT_B` and `answer`, counted in `report`; None if it is left out of the output.

    `judged`: the samples of A and of B, ignored where the row's own CoTs stay. `options`: the command line.
    """
    pair = row.pair
    cots, fault = ("", ""), ""
    if row.keeps_cots:
        cots = (pair.cot_a, pair.cot_b)
        judged = [[read_judgement(cot, pair.problem)] for cot in cots]  # of any form
    choice = choose_pair(*judged, label=pair.label, tie_margin=options.tie_margin)
    if row.keeps_cots:
        report.rows_with_kept_cots += 1
    elif choice is None:
        fault = _explain(pair.row, judged, report.failures)
    elif options.require_agreement and choice.agrees is False:
        nearest = "" if choice.difference is None else f"; A minus B is {choice.difference:+.2f} at the nearest"
        fault = f"no pair of CoTs agrees with the label {pair.label}{nearest}"
    else:
        cots = (choice.a.cot, choice.b.cot)
        report.rows_with_collected_cots += 1
        report.rows_agreeing += choice.agrees is True
        report.rows_disagreeing += [pair.row] if choice.agrees is False else []
    if fault:
        report.rows_without_cots.append({"row": pair.row, "reason": fault})
        if options.drop_incomplete:
            return None
    confirmed = (choice.a.scores, choice.b.scores) if choice and choice.agrees else None
    answer, source = _write_answer(row, confirmed, replaces=options.replace_answers)
    report.answers[source] += 1
    return {**row.cells, "CoT_A": cots[0], "CoT_B": cots[1], ANSWER_COLUMN: answer}


def _explain(row: int, judged: Sequence[Judged], failures: Sequence[VideoFailure]) -> str:
    """Why a row has no CoTs to choose. Example: video A: none of 4 CoTs is well-formed: 4 empty."""
    errors = [f"video {failure.video}: {failure.error}" for failure in failures if failure.row == row]
    causes = []
    for side, found in zip("AB", judged, strict=True):
        if not any(isinstance(judgement, Judgement) for judgement in found):
            counts = ", ".join(f"{count} {cause}" for cause, count in Counter(found).items())
            causes.append(f"video {side}: none of {len(found)} CoTs is well-formed: {counts}")
    return "; ".join(errors or causes)  # an error says more


def _write_answer(row: Row, confirmed: tuple[Scores, Scores] | None, *, replaces: bool) -> tuple[str, str]:
    """Stage 2's answer and its source. `confirmed`: sub-scores of CoTs that agree with the label."""
    present = row.cells.get(ANSWER_COLUMN, "")
    if present.strip() and not replaces:
        return present, "answers that were there"
    source = "label and CoTs that agree with it" if confirmed else "label only"
    return build_answer(row.pair.label, row.opinions or confirmed), "label and MOS columns" if row.opinions else source
