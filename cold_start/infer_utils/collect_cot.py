"""Collect chains of thought (CoTs) for a preference CSV with any Qwen3-VL, by vLLM here or by a server.

    python -m infer_utils.collect_cot preferences.csv --output with_cots.csv --model Qwen/Qwen3-VL-8B-Instruct
    python -m infer_utils.collect_cot preferences.csv --output with_cots.csv --model NAME --endpoint http://host:8000/v1

Several CoTs are sampled a video; a pair of well-formed ones that agrees with the label fills CoT_A and CoT_B, and
stage 2's `answer` is written too. A killed run goes on from where it stopped:

    with_cots.csv             the input's rows and columns, with CoT_A, CoT_B and answer
    with_cots.samples.jsonl   every CoT that was sampled
    with_cots.report.json     counts, rows without CoTs and why
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from infer_utils.cot_identity import describe_samples
from infer_utils.cot_journal import CotJournal
from infer_utils.cot_options import (
    build_prompts,
    build_rules,
    build_sampling,
    build_source,
    check_output,
    parse_options,
)
from infer_utils.cot_plan import CotSource, PromptCheck, VideoFailure, VideoJob, make_plan, read_input
from infer_utils.cot_report import CollectReport, format_report
from infer_utils.cot_results import write_results
from utils import quiet_libraries

logger = logging.getLogger(__name__)


def collect(options: Namespace) -> CollectReport:
    """The whole run. Raises ValueError, before a model is loaded, for what is wrong with flags, CSV or files."""
    sampling, rules = build_sampling(options), build_rules(options)
    data = read_input(options.csv, eval_dim=options.eval_dim)
    output, journal_path = check_output(options, data)
    builder, budget = build_prompts(options)
    source = build_source(options, builder, budget, sampling)
    check = PromptCheck(builder, budget, max_length=options.max_length, max_model_len=source.check())
    plan = make_plan(data, check, sampling, should_replace=options.replace_cots)
    identity = describe_samples(options, data, sampling, builder=builder, budget=budget)
    with CotJournal(journal_path, identity, overwrite=options.overwrite) as journal:
        failures = [*plan.failures, *sample_missing(source, plan.jobs, journal)]
        return write_results(output, plan, journal, failures, builder=builder, rules=rules)


def sample_missing(source: CotSource, jobs: Sequence[VideoJob], journal: CotJournal) -> list[VideoFailure]:
    """Put the samples that are not in the journal there; returns the videos that failed."""
    missing = [replace(job, samples=tuple(key.sample for key in job.keys if key not in journal)) for job in jobs]
    missing = [job for job in missing if job.samples]
    failures = []
    num_wanted = sum(len(job.samples) for job in jobs)
    num_missing = sum(len(job.samples) for job in missing)
    with tqdm(total=num_wanted, initial=num_wanted - num_missing, desc="CoTs", unit="CoT") as progress:
        for result in source.collect(missing) if missing else ():
            if isinstance(result, VideoFailure):
                failures.append(result)
                logger.warning("row %d, video %s: %s", result.row, result.side, result.message)
            else:
                journal.add(result)
                progress.update()
    return failures


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(__doc__, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    try:
        report = collect(options)
    except ValueError as error:
        sys.stderr.write(f"collect_cot: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("collect_cot: interrupted; the same command goes on from here\n")
        return 130
    sys.stdout.write(format_report(report, Path(options.output), is_dropping=options.drop_incomplete) + "\n")
    return 0 if report.rows_with_collected_cots else 1


if __name__ == "__main__":
    sys.exit(main())
