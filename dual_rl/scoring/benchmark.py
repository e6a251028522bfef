"""A benchmark from its CSV to its table: read, score what is missing, write.

    out.csv             the benchmark's rows with Reward_A Reward_B CoT_A CoT_B (Reward CoT for single videos)
    out.json            accuracies, counts, failures, and what the rewards depend on
    out.rewards.jsonl   the journal: a killed run resumes from it

Data and checkpoint are checked before an engine starts.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from descore.csv_table import CsvError
from descore.progress import progress
from scoring.bench_csv import Bench, BenchType, read_bench, read_columns
from scoring.fleet import score_tasks
from scoring.html_report import check_page_path, write_report
from scoring.journal import Journal
from scoring.options import ModelSource
from scoring.report import added_columns, summarise, write_csv, write_json
from scoring.reward_model import choose_device
from scoring.source import (
    RewardScale,
    choose_budget,
    choose_prompt_length,
    compute_scale,
    find_model,
    load_model_scale,
    read_checkpoint,
    save_scale,
)
from scoring.types import VideoTask, require_positive
from verl.model.precision import resolve_precision
from verl.model.reward_files import PolicyCheckpoint, find_folder, fingerprint

JOURNAL_SUFFIX = ".rewards.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkRun:
    """What a run is asked for. `output`: the CSV; the other files are beside it. `seed`: of the bootstrap.

    `num_workers`: engines, None for one per GPU. `save_every`: videos between two forced writes of the journal.
    `video_root`: folder of relative video paths, None for the CSV's. `calibrate`: keep mean and standard deviation of
    these rewards beside the checkpoint; `normalize`: report rewards on the scale that is there. `report`: an HTML
    page to write too.
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
        require_positive("save_every", self.save_every)
        require_positive("num_workers", self.num_workers)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


def run_benchmark(run: BenchmarkRun) -> dict[str, object]:
    """Score the benchmark and return what was written as JSON. Raises ValueError or WorkerError."""
    bench = read_bench(run.data_path, run.bench_type, video_root=run.video_root)
    _check_output(run, bench)
    source = run.source
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt, fresh_head_seed=source.fresh_head_seed)
    identity = describe_run(run, checkpoint)
    if run.calibrate and not os.access(folder := find_folder(find_model(source.model_ckpt)), os.W_OK):
        raise ValueError(f"--calibrate keeps the scale in {folder}, which is not writable: score a copy of it")
    scale = load_model_scale(source.model_ckpt, checkpoint, source.settings) if run.normalize else None
    path = Path(run.output).with_suffix(JOURNAL_SUFFIX)
    with Journal(path, identity, overwrite=run.overwrite, save_every=run.save_every) as journal:
        journal.failures.update(bench.missing)
        _score_missing(run, bench, journal)
        result = _write_results(run, bench, identity, journal, scale=scale)
        if run.calibrate:  # only now: if it fails, the results are there
            scale = _calibrate(run, identity, journal)
            result = _write_results(run, bench, identity, journal, scale=scale)
        if run.report:
            write_report(run.report, bench, journal, result)
    return result


def _check_output(run: BenchmarkRun, bench: Bench) -> None:
    """Raise ValueError unless all results can be written, and no file of another origin is in their place."""
    if run.report:
        check_page_path(run.report)
    output = Path(run.output)
    if output.suffix != ".csv":
        raise ValueError(f"--output is {run.output}; name a .csv file, the others are written beside it")
    if os.path.realpath(output) == os.path.realpath(run.data_path):
        raise ValueError(f"--output is the benchmark itself, {run.data_path}; name another file")
    parent = next(path for path in output.absolute().parents if path.exists())
    if output.is_dir() or not parent.is_dir():
        raise ValueError(f"--output {output} cannot be written: {output if output.is_dir() else parent} is in the way")
    foreign = [path for path in (output, output.with_suffix(".json")) if path.exists()]
    if foreign and not output.with_suffix(JOURNAL_SUFFIX).exists() and not run.overwrite:
        raise ValueError(f"{foreign[0]} exists and is not from such a run: choose another output, or --overwrite")
    taken = [column for column in added_columns(bench) if column in read_columns(run.data_path)]
    if taken:
        raise CsvError(run.data_path, [f"it has the column(s) {', '.join(taken)} already; rename them"])


def describe_run(run: BenchmarkRun, checkpoint: PolicyCheckpoint) -> dict[str, object]:
    """What the rewards depend on, JSON values; the model by its content, so that it may be moved."""
    settings = run.source.settings
    choose_prompt_length(checkpoint, settings)
    return {
        "weights": fingerprint(find_model(run.source.model_ckpt), checkpoint),
        "data": hashlib.blake2b(Path(run.data_path).read_bytes(), digest_size=8).hexdigest(),
        "bench_type": run.bench_type,
        "backend": settings.backend,
        "video": asdict(choose_budget(checkpoint, settings)),
        "format_prompt": checkpoint.format_prompt,
        **settings.affecting_rewards(),
        "precision": str(resolve_precision(settings.precision, choose_device())).removeprefix("torch."),
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
    with progress(total=len(names), description="score", unit="video") as bar:
        for outcome in score_tasks(run.source, tasks, num_gpus=num_gpus, num_workers=num_workers):
            journal.add(outcome)
            bar.set_postfix(failed=len(journal.failures), refresh=False)
            bar.update()


def _write_results(
    run: BenchmarkRun,
    bench: Bench,
    identity: Mapping[str, object],
    journal: Journal,
    *,
    scale: RewardScale | None,
) -> dict[str, object]:
    """Write the scored CSV and the JSON beside it; returns the JSON's content."""
    summary = summarise(bench, journal, seed=run.seed, scale=scale)
    result = {"model_ckpt": run.source.model_ckpt, "data_path": run.data_path, "run": identity, **summary}
    write_csv(Path(run.output), bench, journal, scale=scale)
    write_json(Path(run.output).with_suffix(".json"), result)
    return result


def _calibrate(run: BenchmarkRun, identity: Mapping[str, object], journal: Journal) -> RewardScale:
    rewards, data = list(journal.rewards.values()), os.path.basename(run.data_path)
    scale = compute_scale(rewards, data=data, weights=identity["weights"], video=identity["video"])
    path = save_scale(run.source.model_ckpt, scale)
    logger.info("the scale of these rewards, %.4f +- %.4f, is kept in %s", scale.mean, scale.std, path)
    return scale
