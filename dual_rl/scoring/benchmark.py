"""A benchmark from its CSV to the table: plan, score what is missing, write.

    out.csv             the benchmark's rows with Reward_A Reward_B CoT_A CoT_B (Reward CoT for single videos)
    out.json            accuracies, counts, failures, and what the rewards depend on
    out.rewards.jsonl   the journal: a killed run goes on from it

Data and checkpoint are checked before an engine starts.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from descore.csv_table import CsvError
from scoring.bench_csv import Bench, BenchType, read_bench, read_columns
from scoring.fleet import ModelSource, score_tasks
from scoring.html_report import check_page_path, write_report
from scoring.journal import Journal
from scoring.report import added_columns, format_table, summarise, write_csv, write_json
from scoring.scale import RewardScale, compute_scale, save_scale
from scoring.scoring import Outcome, VideoTask
from scoring.source import (
    choose_budget,
    choose_device,
    choose_prompt_length,
    find_model,
    load_model_scale,
    read_checkpoint,
)
from verl.model.fingerprint import fingerprint
from verl.model.precision import resolve_precision
from verl.model.reward_files import PolicyCheckpoint, find_folder

JOURNAL_SUFFIX = ".rewards.jsonl"
SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger("verl")


@dataclass(frozen=True)
class BenchmarkRun:
    """What a run is asked for. `output`: the CSV; the other files stand beside it. `seed`: of the bootstrap.

    `num_workers`: engines, None for one a GPU. `save_every`: videos between two moments at which the journal is forced
    to disk. `video_root`: folder of relative video paths, None for the CSV's. `calibrate`: keep mean and standard
    deviation of these rewards beside the checkpoint; `normalize`: give rewards on the scale that is there. `report`:
    an HTML page to write too.
    """

    data_path: str
    bench_type: BenchType
    output: str
    source: ModelSource
    seed: int = 0
    save_every: int = 100
    num_workers: int | None = None
    video_root: str | None = None
    overwrite: bool = False
    calibrate: bool = False
    normalize: bool = False
    report: str | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


def run_benchmark(run: BenchmarkRun) -> dict[str, object]:
    """Score the benchmark and return what was written as JSON. Raises ValueError or WorkerError for people."""
    bench = read_bench(run.data_path, run.bench_type, video_root=run.video_root)
    _check_output(run, bench)
    output = Path(run.output)
    source = run.source
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt, fresh_head_seed=source.fresh_head_seed)
    identity = describe_run(run, checkpoint)
    if run.calibrate and not os.access(folder := find_folder(find_model(source.model_ckpt)), os.W_OK):
        raise ValueError(f"--calibrate keeps the scale in {folder}, which cannot be written: score a copy of it")
    scale = load_model_scale(source.model_ckpt, checkpoint, source.settings) if run.normalize else None
    with Journal(
        output.with_suffix(JOURNAL_SUFFIX), identity, overwrite=run.overwrite, save_every=run.save_every
    ) as journal:
        journal.failures.update(bench.missing)
        _score_missing(run, bench, journal)
        result = _write_results(run, bench, identity, journal, scale=scale)
        if run.calibrate:  # only now: should it fail, the results are there
            scale = _calibrate(run, identity, journal)
            result = _write_results(run, bench, identity, journal, scale=scale)
        if run.report:
            write_report(run.report, bench, journal, result)
    return result


def _write_results(
    run: BenchmarkRun,
    bench: Bench,
    identity: Mapping[str, object],
    journal: Journal,
    *,
    scale: RewardScale | None,
) -> dict[str, object]:
    """Write the scored CSV and the JSON beside it; returns what the JSON holds."""
    summary = summarise(bench, journal, seed=run.seed, scale=scale)
    result = {"model_ckpt": run.source.model_ckpt, "data_path": run.data_path, "run": identity, **summary}
    write_csv(Path(run.output), bench, journal, scale=scale)
    write_json(Path(run.output).with_suffix(".json"), result)
    return result


def _calibrate(run: BenchmarkRun, identity: Mapping[str, object], journal: Journal) -> RewardScale:
    scale = compute_scale(
        list(journal.rewards.values()),
        data=os.path.basename(run.data_path),
        weights=identity["weights"],
        video=identity["video"],
    )
    path = save_scale(find_folder(find_model(run.source.model_ckpt)), scale)
    logger.info("the scale of these rewards, %.4f +- %.4f, is kept in %s", scale.mean, scale.std, path)
    return scale


def _check_output(run: BenchmarkRun, bench: Bench) -> None:
    if run.report:
        check_page_path(run.report)
    if Path(run.output).suffix != ".csv":
        raise ValueError(f"--output is {run.output}; name a .csv file, the others are written beside it")
    if os.path.realpath(run.output) == os.path.realpath(run.data_path):
        raise ValueError(f"--output is the benchmark itself, {run.data_path}; name another file")
    _require_free(Path(run.output), overwrite=run.overwrite)
    taken = [column for column in added_columns(bench) if column in read_columns(run.data_path)]
    if taken:
        raise CsvError(run.data_path, [f"it has the column(s) {', '.join(taken)} already; rename them"])


def _require_free(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError for places that cannot be written, and for files that a run with this output did not write."""
    parent = next(path for path in output.absolute().parents if path.exists())
    if output.is_dir() or not parent.is_dir():
        raise ValueError(f"--output {output} cannot be written: {output if output.is_dir() else parent} is in the way")
    foreign = [path for path in (output, output.with_suffix(".json")) if path.exists()]
    if foreign and not output.with_suffix(JOURNAL_SUFFIX).exists() and not overwrite:
        raise ValueError(f"{foreign[0]} is there and comes from elsewhere: choose another output, or --overwrite")


def describe_run(run: BenchmarkRun, checkpoint: PolicyCheckpoint) -> dict[str, object]:
    """What the rewards depend on, JSON values; the model by its content, so that it may be moved."""
    source = run.source
    choose_prompt_length(checkpoint, source.settings)
    return {
        "weights": fingerprint(find_model(source.model_ckpt), checkpoint),
        "data": hashlib.blake2b(Path(run.data_path).read_bytes(), digest_size=8).hexdigest(),
        "bench_type": run.bench_type,
        "backend": source.settings.backend,
        "video": asdict(choose_budget(checkpoint, source.settings)),
        "format_prompt": checkpoint.format_prompt,
        **source.settings.affecting_rewards(),
        "precision": str(resolve_precision(source.settings.precision, choose_device())).removeprefix("torch."),
    }


def _score_missing(run: BenchmarkRun, bench: Bench, journal: Journal) -> None:
    names = [name for name in bench.items if name not in journal.rewards and name not in bench.missing]
    num_gpus = torch.cuda.device_count()
    num_workers = min(run.num_workers or max(1, num_gpus), max(1, len(names)))
    logger.info(
        "%s: %d rows, %d duplicate, over %d videos, %d not found; %d scored before, %d to score on %s",
        run.bench_type, len(bench.rows), bench.num_duplicate_rows, len(bench.items), len(bench.missing),
        len(journal.rewards), len(names), f"{num_workers} GPU(s)" if num_gpus else f"{num_workers} CPU engine(s)",
    )  # fmt: skip
    if not names:
        return
    tasks = (VideoTask(name, bench.items[name].video, bench.items[name].problem) for name in names)
    outcomes = score_tasks(run.source, tasks, num_gpus=num_gpus, num_workers=num_workers)
    for outcome in _with_progress(outcomes, len(names), journal):
        journal.add(outcome)


def _with_progress(outcomes: Iterator[Outcome], total: int, journal: Journal) -> Iterator[Outcome]:
    """A bar on terminals; elsewhere a line now and then, with the time that is left."""
    has_bar = sys.stderr.isatty()
    start, last, count = time.monotonic(), time.monotonic(), 0
    with tqdm(total=total, desc="score", unit="video", disable=not has_bar, dynamic_ncols=True) as bar:
        for outcome in outcomes:
            yield outcome
            count += 1
            bar.update()
            if not count % 10:
                bar.set_postfix(failed=len(journal.failures))
            now = time.monotonic()
            if not has_bar and now - last >= SECONDS_BETWEEN_LINES:
                last, left = now, (now - start) / count * (total - count)
                logger.info(
                    "%d of %d videos, %d failed, %.2f a second, %d:%02d left",
                    count, total, len(journal.failures), count / (now - start), left // 60, left % 60,
                )  # fmt: skip


def describe_result(result: dict[str, object]) -> str:
    """The table for the console, failures first."""
    failures = [f"failed: {failure['error']}" for failure in result["failures"][:10]]
    more = len(result["failures"]) - len(failures)
    if more > 0:
        failures.append(f"... and {more} more, see the JSON")
    return "\n".join([*failures, format_table(result)])
