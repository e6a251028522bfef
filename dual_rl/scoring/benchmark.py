"""A benchmark from its CSV to its table: read, score what is missing, write.

    out.csv             the benchmark's rows with Reward_A Reward_B CoT_A CoT_B (Reward CoT for single videos)
    out.json            accuracies, counts, failures, and what the rewards depend on
    out.rewards.jsonl   the journal: a killed run resumes from it

Data and checkpoint are checked before an engine starts.
"""

import argparse
import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from descore.csv_table import CsvError
from descore.progress import progress
from scoring.bench_csv import Bench, read_bench
from scoring.fleet import score_tasks
from scoring.html_report import check_page_path, write_report
from scoring.journal import Journal
from scoring.options import ModelSource, build_source
from scoring.report import added_columns, summarise, write_csv
from scoring.reward_model import choose_device
from scoring.source import (
    choose_budget,
    choose_prompt_length,
    compute_scale,
    find_model,
    find_model_scale,
    load_model_scale,
    read_checkpoint,
    save_scale,
)
from scoring.types import ScoringSettings, require_positive
from scoring.watch import describe, find_signs, measure, observe
from verl.model.precision import resolve_precision
from verl.model.reward_files import PolicyCheckpoint, find_folder, fingerprint
from verl.trainer.checkpoints import write_atomically

JOURNAL_SUFFIX = ".rewards.jsonl"
AFFECTING_REWARDS = ("max_prompt_length", "max_new_tokens", "repetition_penalty", "mask_cot")
"""Settings that rewards depend on, besides backend, video budget and precision."""

logger = logging.getLogger(__name__)


def run_benchmark(options: argparse.Namespace) -> dict[str, object]:
    """Score the benchmark that the flags of inference.py describe, and return what was written as JSON.

    Raises ValueError for mistakes, OSError for files that cannot be written, WorkerError for an engine that died.
    """
    for name in ("save_every", "num_workers"):
        require_positive(name, getattr(options, name))
    if options.seed < 0:
        raise ValueError(f"seed is {options.seed}; it must not be negative")
    if options.calibrate and options.normalize:
        raise ValueError("--calibrate keeps a new scale and --normalize uses the one kept. Run one after the other.")
    source, output = build_source(options), Path(options.output)
    bench = read_bench(options.data_path, options.bench_type, video_root=options.video_root)
    _check_output(options, bench)
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt)
    identity = describe_run(options, source.settings, checkpoint)
    if options.calibrate and not os.access(folder := find_folder(find_model(source.model_ckpt)), os.W_OK):
        raise ValueError(f"--calibrate keeps the scale in {folder}, which is not writable: score a copy of it")
    scale = load_model_scale(source.model_ckpt, checkpoint, source.settings) if options.normalize else None
    path = output.with_suffix(JOURNAL_SUFFIX)
    with Journal(path, identity, overwrite=options.overwrite, save_every=options.save_every) as journal:
        journal.failures.update(bench.missing)
        _score_missing(source, bench, journal, num_workers=options.num_workers)
        summary = summarise(bench, journal, seed=options.seed, scale=scale)
        result = {"model_ckpt": source.model_ckpt, "data_path": options.data_path, "run": identity, **summary}
        figures = measure([observe(journal.read(name)) for name in journal.rewards]) if journal.rewards else None
        known = scale or find_model_scale(source.model_ckpt, checkpoint, source.settings)
        if figures and known and not options.calibrate:
            result["watch"] = {"signs": find_signs(figures, known), "summary": describe(figures, known)}
        write_csv(output, bench, journal, scale=scale)
        write_atomically(output.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
        if options.report:
            write_report(options.report, bench, journal, result)
        if options.calibrate:  # at the end: if there is no spread, the results are there
            rewards, data = list(journal.rewards.values()), os.path.basename(options.data_path)
            scale = compute_scale(rewards, data=data, weights=identity["weights"], video=identity["video"])
            thoughts = {name: getattr(figures, name) for name in ("agreement", "agreement_error", "faulty")}
            path = save_scale(source.model_ckpt, replace(scale, **thoughts))
            logger.info("the scale of these rewards, %.4f +- %.4f, is kept in %s", scale.mean, scale.std, path)
    return result


def _check_output(options: argparse.Namespace, bench: Bench) -> None:
    """Raise ValueError if the results must not be written: files of another origin, or the benchmark, are there."""
    if options.report:
        check_page_path(options.report)
    output = Path(options.output)
    if output.suffix != ".csv" or output.is_dir():
        raise ValueError(f"--output is {output}; name a .csv file, the others are written beside it")
    if os.path.realpath(output) == os.path.realpath(bench.path):
        raise ValueError(f"--output is the benchmark itself, {bench.path}; name another file")
    foreign = [path for path in (output, output.with_suffix(".json")) if path.exists()]
    if foreign and not output.with_suffix(JOURNAL_SUFFIX).exists() and not options.overwrite:
        raise ValueError(f"{foreign[0]} exists and is not from such a run: choose another output, or --overwrite")
    taken = [column for column in added_columns(bench) if column in bench.columns]
    if taken:
        raise CsvError(bench.path, [f"it has the column(s) {', '.join(taken)} already; rename them"])


def describe_run(
    options: argparse.Namespace, settings: ScoringSettings, checkpoint: PolicyCheckpoint
) -> dict[str, object]:
    """What the rewards depend on, JSON values; the model by its content, so that it may be moved."""
    choose_prompt_length(checkpoint, settings)
    return {
        "weights": fingerprint(find_model(options.model_ckpt), checkpoint),
        "data": hashlib.blake2b(Path(options.data_path).read_bytes(), digest_size=8).hexdigest(),
        "bench_type": options.bench_type,
        "backend": settings.backend,
        "video": asdict(choose_budget(checkpoint, settings)),
        "format_prompt": checkpoint.format_prompt,
        **{name: getattr(settings, name) for name in AFFECTING_REWARDS},
        "precision": str(resolve_precision(settings.precision, choose_device())).removeprefix("torch."),
    }


def _score_missing(source: ModelSource, bench: Bench, journal: Journal, *, num_workers: int | None) -> None:
    names = [name for name in bench.items if name not in journal.rewards and name not in bench.missing]
    num_gpus = torch.cuda.device_count()
    num_workers = min(num_workers or max(1, num_gpus), max(1, len(names)))
    logger.info(
        "%s: %d rows, %d duplicate, over %d videos, %d not found; %d scored before, %d to score on %s",
        bench.bench_type, len(bench.rows), bench.num_duplicate_rows, len(bench.items), len(bench.missing),
        len(journal.rewards), len(names), f"{num_workers} GPU(s)" if num_gpus else f"{num_workers} CPU engine(s)",
    )  # fmt: skip
    if not names:
        return
    with progress(total=len(names), description="score", unit="video") as bar:
        tasks = [bench.items[name] for name in names]
        for outcome in score_tasks(source, tasks, num_gpus=num_gpus, num_workers=num_workers):
            journal.add(outcome)
            bar.set_postfix(failed=len(journal.failures), refresh=False)
            bar.update()
