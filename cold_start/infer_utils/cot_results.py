"""From samples to the CSV: which chains of thought (CoTs) each row gets, and its stage 2 answer."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infer_utils.cot_answers import AnswerSource, Scores, build_answer, read_opinions
from infer_utils.cot_journal import CotJournal, Sample, SampleKey
from infer_utils.cot_plan import COT_COLUMNS, SIDES, CollectPlan, VideoFailure, VideoJob
from infer_utils.cot_report import REPORT_SUFFIX, CollectReport
from infer_utils.cot_selection import Judgement, Malformed, PairChoice, choose_pair, read_judgement, read_rubric
from infer_utils.cot_table import write_table, write_text
from preference_csv import PreferencePair
from scored_sequence import NUM_CLOSING_TOKENS, SequenceBuilder

ANSWER_COLUMN = "answer"


@dataclass(frozen=True)
class SelectionRules:
    """How CoTs are chosen and rows written.

    `max_length`: tokens of a training sequence. `tie_margin`: points by which two overall scores under the label
    `same` may differ. `require_agreement`: no CoTs rather than such as contradict the label. `drop_incomplete`: leave
    rows without CoTs out. `replace_answers`: write `answer` anew where there is one.
    """

    max_length: int
    tie_margin: float
    require_agreement: bool
    drop_incomplete: bool
    replace_answers: bool


@dataclass(frozen=True)
class RowOutcome:
    """What a row gets.

    `cots`: of A and B, or None, for the `reason`. `confirmed_scores`: sub-scores of A and B by CoTs that agree with
    the label, else None. `agrees`: None where the label says nothing, or nothing is known.
    """

    cots: tuple[str, str] | None
    confirmed_scores: tuple[Scores, Scores] | None = None
    agrees: bool | None = None
    reason: str = ""


class CotChooser:
    """Judges samples, chooses for each row, and counts in `report`."""

    def __init__(self, builder: SequenceBuilder, rules: SelectionRules, report: CollectReport) -> None:
        self.builder = builder
        self.rules = rules
        self.report = report

    def collect_row(
        self, pair: PreferencePair, jobs: Sequence[VideoJob], samples: Mapping[SampleKey, Sample]
    ) -> RowOutcome:
        """Choose among the samples of a row's videos. `jobs`: of A and B."""
        judgements: dict[str, dict[int, Judgement]] = {}
        reasons = []
        for job in jobs:
            judged = self._judge_all(job, [samples[key] for key in job.keys if key in samples])
            judgements[job.side] = {number: found for number, found in judged.items() if isinstance(found, Judgement)}
            if not judgements[job.side]:
                causes = ", ".join(f"{count} {cause}" for cause, count in Counter(judged.values()).items())
                of_them = f"none of {len(judged)} CoTs is well-formed: {causes}" if judged else "no CoTs"
                reasons.append(f"video {job.side}: {of_them}")
        if reasons or not jobs:
            return RowOutcome(None, reason="; ".join(reasons))
        choice = choose_pair(*(judgements[side] for side in SIDES), label=pair.label, tie_margin=self.rules.tie_margin)
        if self.rules.require_agreement and choice.agrees is False:
            nearest = "" if choice.difference is None else f"; A minus B is {choice.difference:+.2f} at the nearest"
            return RowOutcome(None, reason=f"no pair of CoTs agrees with the label {pair.label}{nearest}")
        numbers = dict(zip(SIDES, (choice.sample_a, choice.sample_b), strict=True))
        cots = tuple(samples[SampleKey(pair.row, side, number)].text for side, number in numbers.items())
        return _build_outcome(cots, choice, [judgements[side][number] for side, number in numbers.items()])

    def keep_row(self, pair: PreferencePair) -> RowOutcome:
        """The CoTs that a row has already; they may have any form."""
        cots, rubric = (pair.cot_a, pair.cot_b), read_rubric(pair.problem)
        found = [read_judgement(cot, rubric) for cot in cots]
        if not all(isinstance(judgement, Judgement) for judgement in found):
            return RowOutcome(cots)
        choice = choose_pair({0: found[0]}, {0: found[1]}, label=pair.label, tie_margin=self.rules.tie_margin)
        return _build_outcome(cots, choice, found)

    def _judge_all(self, job: VideoJob, samples: Sequence[Sample]) -> dict[int, Judgement | Malformed]:
        judged = {sample.key.sample: self._judge(sample, job) for sample in samples}
        self.report.videos += bool(samples)
        self.report.samples += len(samples)
        self.report.malformed.update(str(found) for found in judged.values() if isinstance(found, Malformed))
        self.report.samples_with_another_prompt += sum(
            sample.num_prompt_tokens not in (None, job.num_prompt_tokens) for sample in samples
        )
        return judged

    def _judge(self, sample: Sample, job: VideoJob) -> Judgement | Malformed:
        """What a sample says, or why it is not taken; what is taken, stage 1 can train on."""
        if not sample.is_finished:
            return Malformed.CUT
        try:
            num_tokens = len(self.builder.encode_cot(sample.text))
        except ValueError:
            return Malformed.RESERVED
        if any(token in sample.text for token in self.builder.tokenizer.all_special_tokens):
            return Malformed.RESERVED
        if job.num_prompt_tokens + num_tokens + NUM_CLOSING_TOKENS > self.rules.max_length:
            return Malformed.TOO_LONG
        return read_judgement(sample.text, read_rubric(job.problem))


def _build_outcome(cots: tuple[str, str], choice: PairChoice, judgements: Sequence[Judgement]) -> RowOutcome:
    scores = (judgements[0].scores, judgements[1].scores) if choice.agrees else None
    return RowOutcome(cots, confirmed_scores=scores, agrees=choice.agrees)


def write_results(
    output: Path,
    plan: CollectPlan,
    journal: CotJournal,
    failures: Iterable[VideoFailure],
    *,
    builder: SequenceBuilder,
    rules: SelectionRules,
) -> CollectReport:
    """Choose for every row, write the CSV and the report beside it, and return the report."""
    ordered = sorted(failures, key=lambda failure: (failure.row, failure.side))
    report = CollectReport(rows=len(plan.data.pairs))
    report.failures = [{"row": f.row, "video": f.side, "error": f.message} for f in ordered]
    chooser = CotChooser(builder, rules, report)
    jobs: dict[int, list[VideoJob]] = {}
    for job in plan.jobs:
        jobs.setdefault(job.row, []).append(job)
    header = list(dict.fromkeys([*plan.data.table.header, *COT_COLUMNS, ANSWER_COLUMN]))
    rows = []
    for pair in plan.data.pairs:
        if pair.row in plan.kept_rows:
            outcome = chooser.keep_row(pair)
            report.rows_with_kept_cots += 1
        else:
            keys = [key for job in jobs.get(pair.row, ()) for key in job.keys if key in journal]
            samples = {key: journal.read(key) for key in keys}
            outcome = chooser.collect_row(pair, jobs.get(pair.row, ()), samples)
            _report_row(report, pair, outcome, [f"video {f.side}: {f.message}" for f in ordered if f.row == pair.row])
        if outcome.cots or not rules.drop_incomplete:
            cells = plan.data.table.cells(pair.row) | dict(zip(COT_COLUMNS, outcome.cots or ("", ""), strict=True))
            cells[ANSWER_COLUMN] = _write_answer(report, pair, cells, outcome, rules)
            rows.append([cells[name] for name in header])
    write_table(output, header, rows)
    write_text(output.with_suffix(REPORT_SUFFIX), json.dumps(vars(report), indent=2) + "\n")
    return report


def _report_row(report: CollectReport, pair: PreferencePair, outcome: RowOutcome, failures: Sequence[str]) -> None:
    """Count a row. `failures`: of its videos; they say more about missing CoTs than the samples that there are."""
    if outcome.cots is None:
        report.rows_without_cots.append({"row": pair.row, "reason": "; ".join(failures) or outcome.reason})
        return
    report.rows_with_collected_cots += 1
    report.rows_agreeing += outcome.agrees is True
    if outcome.agrees is False:
        report.rows_disagreeing.append(pair.row)


def _write_answer(
    report: CollectReport, pair: PreferencePair, cells: Mapping[str, str], outcome: RowOutcome, rules: SelectionRules
) -> str:
    """The `answer` cell, counted by its source."""
    present = cells.get(ANSWER_COLUMN, "")
    if present.strip() and not rules.replace_answers:
        report.answers[AnswerSource.KEPT] += 1
        return present
    scores, source = read_opinions(cells, read_rubric(pair.problem)), AnswerSource.OPINIONS
    if scores is None:
        scores, source = outcome.confirmed_scores, AnswerSource.COTS
    if scores is None:
        source = AnswerSource.LABEL
    report.answers[source] += 1
    return build_answer(pair.label, scores)
