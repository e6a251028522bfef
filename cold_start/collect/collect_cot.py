"""Collect chains of thought (CoTs) for a preference CSV with any Qwen3-VL, in vLLM here or on a server.

    python -m collect.collect_cot preferences.csv --output with_cots.csv --model Qwen/Qwen3-VL-8B-Instruct
    python -m collect.collect_cot preferences.csv --output with_cots.csv --model NAME --endpoint http://host:8000/v1

Several CoTs are sampled per video. A well-formed pair that agrees with the label fills CoT_A and CoT_B; the column
`answer` is for stage 2. The same command resumes a killed run:

    with_cots.csv             the input's rows and columns, with CoT_A, CoT_B and answer
    with_cots.samples.jsonl   every CoT that was sampled
    with_cots.report.json     counts, rows without CoTs and why

How a row is processed: `read_rows` parses it; `plan_jobs` makes a job per video; `endpoint` samples CoTs into the
journal, on the user's server or on one that `local_server` starts; `annotate` in `results` fills the row by the rules
of `selection`.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from checkpoint import RewardConfig, fingerprint_weights, load_builder
from collect import local_server
from collect.endpoint import VIDEO_FORMS, Endpoint, Sample, SampleKey, VideoFailure, VideoJob
from collect.results import ANSWER_COLUMN, CollectReport, CotJournal, Row, annotate, judge_samples
from collect.selection import read_opinions
from descore.csv_table import CsvTable, parse_two_paths
from descore.progress import progress
from infer_utils.scorer import MAX_COT_TOKENS
from model_qwen3 import quiet_libraries
from preference_csv import CsvNeeds, read_pairs, require_clean
from scored_sequence import NUM_CLOSING_TOKENS
from vision_process import VideoError, probe_videos

logger = logging.getLogger(__name__)

JOURNAL_SUFFIX, REPORT_SUFFIX = ".samples.jsonl", ".report.json"
SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


def collect(options: argparse.Namespace) -> CollectReport:
    """The whole run. Raises ValueError for faults of flags, CSV or files before a model is loaded."""
    rows = read_rows(options)
    output = check_output(options, rows)
    endpoint = build_endpoint(options)
    max_model_len = endpoint.check() if options.endpoint else local_server.check_model(options.model)
    jobs, failures = plan_jobs(endpoint, rows, max_model_len=max_model_len)
    identity = describe_samples(endpoint, rows)
    with CotJournal(output.with_suffix(JOURNAL_SUFFIX), identity, overwrite=options.overwrite) as journal:
        failures += sample_missing(endpoint, jobs, journal)
        report = CollectReport(rows=len(rows), failures=sorted(failures))
        job_of, table = {(job.row, job.side): job for job in jobs}, []
        for row in rows:
            of_sides = (job_of.get((row.pair.row, side)) for side in "AB")
            judged = [judge_samples(job, journal, endpoint.builder, options.max_length, report) for job in of_sides]
            table.append(annotate(row, judged, options, report))
    write_csv(output, [cells for cells in table if cells is not None], columns=rows[0].cells)
    text = json.dumps(vars(report), default=asdict, indent=2) + "\n"
    output.with_suffix(REPORT_SUFFIX).write_text(text, encoding="utf-8")
    return report


def read_rows(options: argparse.Namespace) -> list[Row]:
    """The CSV's rows. Raises CsvError that lists every faulty cell, and ValueError if no row needs CoTs."""
    pairs = read_pairs(options.csv, CsvNeeds(eval_dim=[options.eval_dim], cots=False))
    rows, faults = [], []
    for pair, table_row in zip(pairs, CsvTable(options.csv).rows(), strict=True):
        has_cots = bool(pair.cot_a.strip() and pair.cot_b.strip())
        try:
            opinions = read_opinions(table_row.cells, pair.problem)
        except ValueError as error:
            faults.append(f"row {pair.row}: {error}")
        else:
            rows.append(Row(pair, table_row.cells, opinions, keeps_cots=has_cots and not options.replace_cots))
    require_clean(options.csv, faults)
    if all(row.keeps_cots for row in rows):
        raise ValueError(f"{options.csv}: every row has both CoTs. Add --replace_cots to sample new ones.")
    return rows


def plan_jobs(
    endpoint: Endpoint, rows: Sequence[Row], *, max_model_len: int | None
) -> tuple[list[VideoJob], list[VideoFailure]]:
    """A job per video of the rows without CoTs. Raises CsvError that lists every missing file and faulty prompt.

    A file that exists but does not decode is a failure, not a fault of the CSV: its row is left without CoTs.
    """
    options, pairs = endpoint.options, [row.pair for row in rows if not row.keeps_cots]
    videos = [(pair, *side) for pair in pairs for side in (("A", pair.video_a), ("B", pair.video_b))]
    headers = probe_videos((video for _, _, video in videos), endpoint.budget)
    jobs, failures, faults = [], [], []
    for pair, side, video in videos:
        header = headers[video]
        if isinstance(header, VideoError):
            failures.append(VideoFailure(pair.row, side, str(header)))
            if not Path(video).is_file():
                faults.append(f"row {pair.row}, video {side}: {header}. Correct the path or remove the row.")
            continue
        try:
            num_tokens = endpoint.builder.count_prompt_tokens(pair.problem, header, endpoint.budget)
            check_length(options, num_tokens, max_model_len)
        except ValueError as error:
            faults.append(f"row {pair.row}, video {side}: {error}")
            continue
        keys = tuple(SampleKey(pair.row, side, number) for number in range(options.num_samples))
        jobs.append(VideoJob(pair.row, side, video, pair.problem, num_tokens, keys))
    require_clean(options.csv, faults)
    failed_rows = {failure.row for failure in failures}
    return [job for job in jobs if job.row not in failed_rows], failures


def check_length(options: argparse.Namespace, num_tokens: int, max_model_len: int | None) -> None:
    """Raise ValueError if a CoT has no room after a prompt of `num_tokens`."""
    prompt = f"a prompt of {num_tokens} tokens"
    if num_tokens + NUM_CLOSING_TOKENS >= options.max_length:
        raise ValueError(f"{prompt} leaves no room for a CoT under --max_length {options.max_length}.")
    if max_model_len is not None and num_tokens + options.max_tokens > max_model_len:
        remedy = "Lower --max_tokens, --fps or --max_pixels, or remove the row."
        raise ValueError(f"{prompt} and a CoT of {options.max_tokens} exceed the model's {max_model_len}. {remedy}")


def sample_missing(endpoint: Endpoint, jobs: Sequence[VideoJob], journal: CotJournal) -> list[VideoFailure]:
    """Sample into the journal what it lacks; returns the videos that failed. Without a URL, a server is started."""
    missing = [replace(job, keys=tuple(key for key in job.keys if key not in journal.samples)) for job in jobs]
    missing = [job for job in missing if job.keys]
    failures: list[VideoFailure] = []

    def put(result: Sample | VideoFailure) -> None:
        bar.update()
        if isinstance(result, Sample):
            journal.add(result)
        else:
            failures.append(result)
            logger.warning("row %d, video %s: %s", result.row, result.video, result.error)

    with contextlib.ExitStack() as stack:
        if missing and not endpoint.url:
            longest = max(job.num_prompt_tokens for job in missing) + endpoint.options.max_tokens
            url = stack.enter_context(local_server.serve(endpoint.options.model, max_model_len=longest))
            endpoint = replace(endpoint, url=url)
        num_samples = sum(len(job.keys) for job in missing)
        bar = stack.enter_context(progress(total=num_samples, description="CoTs", unit="CoT"))
        endpoint.generate(missing, put)
    return failures


def write_csv(path: Path, table: Sequence[Mapping[str, str]], *, columns: Mapping[str, str]) -> None:
    """Write the input's columns and the new ones under a temporary name, then rename it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        header = dict.fromkeys([*columns, "CoT_A", "CoT_B", ANSWER_COLUMN])
        # Otherwise a lone carriage return stays unquoted, which some readers take for the end of a line.
        writer = csv.DictWriter(file, header, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(table)
    os.replace(temporary, path)


def describe_samples(endpoint: Endpoint, rows: Sequence[Row]) -> dict[str, object]:
    """What samples depend on. Selection, labels and the number of samples may change between runs."""
    options, folder = endpoint.options, Path(endpoint.options.model)
    is_local = options.endpoint is None and folder.is_dir()
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(repr((row.cells["videos"], endpoint.builder.render(row.pair.problem))).encode())
    return {
        "model": folder.resolve().name if is_local else options.model,
        "weights": fingerprint_weights(folder) if is_local else None,
        "source": f"endpoint, {options.send_video}" if options.endpoint else "vllm",
        "sampling": {name: getattr(options, name) for name in SAMPLING},
        "budget": asdict(endpoint.budget),
        "data": digest.hexdigest(),
    }


def check_output(options: argparse.Namespace, rows: Sequence[Row]) -> Path:
    """The output's path. Raises ValueError where writing would destroy a file, or break relative video paths."""
    source, output = Path(options.csv).resolve(), Path(options.output).resolve()
    name = f"--output {options.output}"
    if output == source:
        raise ValueError("--output is the input. Choose another name.")
    if output.exists() and not output.with_suffix(JOURNAL_SUFFIX).exists() and not options.overwrite:
        raise ValueError(f"{name} exists, and collect_cot did not write it. Choose another name, or add --overwrite.")
    has_relative = any(not os.path.isabs(v) for row in rows for v in parse_two_paths(row.cells["videos"], "videos"))
    if output.parent != source.parent and has_relative:
        raise ValueError(f"{name} is not in {source.parent}, which the video paths are relative to. Put it there.")
    return output


def build_endpoint(options: argparse.Namespace) -> Endpoint:
    """The server, with training's prompts and frames. Raises ValueError if the processor cannot be loaded."""
    source = options.processor or options.model
    changes = {name: getattr(options, name) for name in ("fps", "min_frames", "min_pixels", "max_pixels")}
    config = RewardConfig.resolve(source, format_prompt=options.format_prompt, **changes)
    try:
        builder = load_builder(source, config)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: of another kind of model
        remedy = "Give the folder or hub name of a Qwen3-VL with --processor."
        raise ValueError(f"{source} has no Qwen3-VL processor: {error}\n{remedy}") from error
    send_video = options.send_video if options.endpoint else "frames"
    return Endpoint(options, builder, config.video, url=options.endpoint or "", send_video=send_video)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. A wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("csv", help="preference CSV: videos, GSB, problem or prompt; see datasets/train/README.md")
    add("--output", required=True, help="CSV to write, in the folder that the input's video paths are relative to")
    add("--model", required=True, help="a Qwen3-VL: folder, hub name, or the server's name for it")
    add("--eval_dim", default="GSB", help="label column")
    add("--overwrite", action="store_true", help="start again where another run wrote --output")
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--num_samples",
        type=number(int, 1),
        default=4,
        help="CoTs per video; a later run with more keeps the first ones",
    )
    add("--temperature", type=number(float, 0), default=0.7)
    add("--top_p", type=number(float, 0.001, 1), default=0.95)
    add(
        "--max_tokens",
        type=number(int, 1),
        default=MAX_COT_TOKENS,
        help="longest CoT; CoTs that are cut off are not used",
    )
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("selection").add_argument
    add("--require_agreement", action="store_true", help="leave rows without CoTs where none agree with the label")
    add(
        "--tie_margin",
        type=number(float, 0),
        default=0.25,
        help="largest difference of overall scores under the label same",
    )
    add("--drop_incomplete", action="store_true", help="leave rows without CoTs out of the output")
    add("--replace_cots", action="store_true", help="sample again for rows that have both CoTs")
    add("--replace_answers", action="store_true", help="overwrite existing answers for stage 2")
    add = parser.add_argument_group("prompt and video, as in training").add_argument
    add("--processor", help="folder or hub name of the tokenizer and video settings; default: --model")
    add("--format_prompt", help="Jinja file with the variable `content` around each problem; default: the processor's")
    add("--fps", type=float, help="sampled frames per second; default: as stored with the processor, or 2")
    add("--min_frames", type=int, help="fewest frames of a clip; default likewise, or 4")
    add("--min_pixels", "--min_frame_pixels", type=int, help="fewest pixels of a frame; default likewise, or 4096")
    add("--max_pixels", "--max_frame_pixels", type=int, help="most pixels of a frame; default likewise, or 200704")
    add("--max_length", type=int, default=8192, help="tokens of the longest sequence; longer CoTs are not used")
    add = parser.add_argument_group("server").add_argument
    add("--endpoint", metavar="URL", help="http://host:port/v1 of any OpenAI-compatible server; default: vLLM here")
    add("--api_key_file", help="file that holds the server's key")
    add("--send_video", choices=VIDEO_FORMS, help="form of the videos for --endpoint, by default clip; see the README")
    add("--concurrency", type=number(int, 1), default=32, help="videos at a time")
    add("--timeout", type=number(float, 0.001), default=600.0, help="seconds that a reply may take")
    options = parser.parse_args(arguments)
    for name in ("api_key_file", "send_video"):
        if getattr(options, name) is not None and options.endpoint is None:
            parser.error(f"--{name} is for a server of yours: give its --endpoint")
    options.send_video = options.send_video or "clip"
    return options


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A flag's type: numbers within bounds."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    return parse


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("openai").setLevel(logging.INFO)  # its retries
    quiet_libraries()
    try:
        report = collect(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"collect_cot: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("collect_cot: interrupted. The same command resumes.\n")
        return 130
    sys.stdout.write(f"{report.format()}\nwritten: {options.output}; more in {REPORT_SUFFIX} beside it\n")
    return 0 if report.rows_with_collected_cots else 1


if __name__ == "__main__":
    sys.exit(main())
