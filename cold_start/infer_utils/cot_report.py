"""What became of a run: counts, rows without chains of thought (CoTs) and why; for the console and as JSON."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

NUM_ROWS_SHOWN = 10
REPORT_SUFFIX = ".report.json"


@dataclass
class CollectReport:
    """Counts of a run, written beside its CSV. Rows are numbered from 1, as in the input.

    `videos`, `samples`: those with CoTs to choose from. `rows_disagreeing`: rows whose CoTs contradict the label.
    `rows_without_cots`: `row` and `reason`. `samples_with_another_prompt`: before which the generator read a prompt of
    another length than training's. `failures`: `row`, `video` and `error` of videos that could not be thought about.
    """

    rows: int = 0
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
    failures: list[dict[str, object]] = field(default_factory=list)


def format_report(report: CollectReport, output: Path, *, is_dropping: bool) -> str:
    """The report as lines for the console. `is_dropping`: rows without CoTs were left out of the CSV."""
    collected, agreeing, disagreeing = (
        report.rows_with_collected_cots,
        report.rows_agreeing,
        len(report.rows_disagreeing),
    )
    causes = "; ".join(f"{count} {cause}" for cause, count in report.malformed.most_common())
    lines = [
        f"{report.videos} videos, {report.samples} samples, {sum(report.malformed.values())} malformed"
        + (f" ({causes})" if causes else ""),
        f"{collected} rows got CoTs: {agreeing} agree with their label, {disagreeing} do not, "
        f"{collected - agreeing - disagreeing} have an invalid one",
        "answers: " + ", ".join(f"{count} from {source}" for source, count in report.answers.items()),
    ]
    if report.rows_with_kept_cots:
        lines.append(f"{report.rows_with_kept_cots} rows keep the CoTs that they had")
    if report.samples_with_another_prompt:
        lines.append(
            f"warning: before {report.samples_with_another_prompt} samples the server read a prompt of another length "
            "than training has: it takes other frames, or uses another chat template (see --send_video)"
        )
    lines += _format_missing(report, is_dropping=is_dropping)
    lines.append(f"written: {output}, {output.with_suffix(REPORT_SUFFIX)}")
    return "\n".join(lines)


def _format_missing(report: CollectReport, *, is_dropping: bool) -> list[str]:
    missing = report.rows_without_cots
    if not missing:
        return []
    fate = "left out" if is_dropping else "written without, which training refuses unless every CoT is masked"
    lines = [f"{len(missing)} of {report.rows} rows have no CoTs ({fate}):"]
    lines += [f"  row {entry['row']}: {entry['reason']}" for entry in missing[:NUM_ROWS_SHOWN]]
    if len(missing) > NUM_ROWS_SHOWN:
        lines.append(f"  ... and {len(missing) - NUM_ROWS_SHOWN} more, all in the report")
    return lines
