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
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from descore.csv_table import CsvError
from descore.progress import progress
from scoring.bench_csv import Bench, read_bench
from scoring.fleet import Engines
from scoring.html_report import check_page_path, write_report
from scoring.journal import Journal
from scoring.options import ModelSource, build_source
from scoring.report import added_columns, choose_main_label, summarise, write_csv
from scoring.reward_model import choose_device
from scoring.source import (
    RewardScale,
    choose_budget,
    choose_prompt_length,
    compute_scale,
    find_calibration,
    find_model,
    load_calibration,
    read_checkpoint,
    save_calibration,
)
from scoring.thinking import ThinkMargin, calibrate_margin, mask_bench, mix_bench
from scoring.types import ScoringSettings, require_positive
from scoring.watch import Figures, describe, find_signs, measure, observe
from verl.model.precision import resolve_precision
from verl.model.reward_files import PolicyCheckpoint, find_folder, fingerprint
from verl.trainer.checkpoints import write_atomically

JOURNAL_SUFFIX = ".rewards.jsonl"
AFFECTING_REWARDS = ("max_prompt_length", "max_new_tokens", "repetition_penalty", "mask_cot")
"""Settings that rewards depend on, besides backend, video budget and precision."""
AFFECTING_IF_SET = ("num_thoughts", "quantization", "kv_cache_dtype")
"""More of them; named only where they are not the defaults, so that journals of older versions can be resumed."""

logger = logging.getLogger(__name__)


def run_benchmark(options: argparse.Namespace) -> dict[str, object]:
    """Score the benchmark that the flags of inference.py describe, and return what was written as JSON.

    Raises ValueError for mistakes, OSError for files that cannot be written, WorkerError for an engine that died.
    """
    for name in ("save_every", "num_workers"):
        require_positive(name, getattr(options, name))
    source, output = build_source(options), Path(options.output)
    bench = read_bench(options.data_path, options.bench_type, video_root=options.video_root)
    _check_modes(options, bench)
    _check_output(options, bench)
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt)
    identity = describe_run(options, source.settings, checkpoint)
    if options.calibrate and not os.access(folder := find_folder(find_model(source.model_ckpt)), os.W_OK):
        raise ValueError(f"--calibrate keeps the scale in {folder}, which is not writable: score a copy of it")
    kept = (source.model_ckpt, checkpoint, source.settings)
    scale = load_calibration(RewardScale, *kept) if options.normalize else None
    rule = load_calibration(ThinkMargin, *kept) if options.think_when_unsure else None
    is_watched = rule is None and not options.calibrate
    known = scale or (find_calibration(RewardScale, *kept) if is_watched else None)
    path = output.with_suffix(JOURNAL_SUFFIX)
    with Journal(path, identity, overwrite=options.overwrite, save_every=options.save_every) as journal:
        bench = _score_missing(source, bench, journal, options, rule)
        summary = summarise(bench, journal, seed=options.seed, scale=scale)
        if rule is not None:
            num_thought = sum(item.num_thoughts is None for item in bench.items.values())
            summary |= {"mean_reward": None, "thinking": {"num_thought": num_thought, **asdict(rule)}}
            for values in summary["labels"].values():  # thresholds would compare two scales
                values |= dict.fromkeys(("with_ties", "threshold", "sweep"))
        result = {"model_ckpt": source.model_ckpt, "data_path": options.data_path, "run": identity, **summary}
        names = [name for name in bench.items if name in journal.rewards] if known or options.calibrate else []
        figures = measure([observe(journal.read(name)) for name in names]) if names else None
        if figures and known:
            result["watch"] = {"signs": find_signs(figures, known), "summary": describe(figures, known)}
        write_csv(output, bench, journal, scale=scale, has_errors=options.num_thoughts > 1)
        write_atomically(output.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
        if options.report:
            write_report(options.report, bench, journal, result)
        if options.calibrate:  # at the end: if there is no spread, the results are there
            _calibrate(options, bench, journal.rewards, figures, identity)
    return result


def _calibrate(
    options: argparse.Namespace,
    bench: Bench,
    rewards: Mapping[str, float],
    figures: Figures | None,
    identity: Mapping[str, object],
) -> None:
    """Keep the scale of these rewards, and the margin if it is asked for. Raises ValueError where there is none."""
    measured = {"data": os.path.basename(options.data_path)}
    measured |= {name: identity[name] for name in ("weights", "video")}
    measured |= {name: getattr(options, name) for name in ("num_thoughts", "quantization")}
    scale = compute_scale([rewards[name] for name in bench.items if name in rewards], **measured)
    thoughts = {name: getattr(figures, name) for name in ("agreement", "agreement_error", "faulty")}
    path = save_calibration(options.model_ckpt, replace(scale, mask_cot=options.mask_cot, **thoughts))
    logger.info("the scale of these rewards, %.4f +- %.4f, is kept in %s", scale.mean, scale.std, path)
    if options.think_agreement is None:
        return
    (path.parent / ThinkMargin.FILE).unlink(missing_ok=True)  # no old one stays where this one is refused
    column = bench.label_columns.index(choose_main_label(bench.label_columns))
    rule = calibrate_margin(bench, rewards, column, least_agreement=options.think_agreement, **measured)
    path = save_calibration(options.model_ckpt, rule)
    logger.info(
        "with a margin of %.4f, %.1f%% of the pairs think and %.1f%% of the verdicts are those of always thinking; "
        "kept in %s", rule.margin, 100 * rule.share_thinking, 100 * rule.agreement, path,
    )  # fmt: skip


def _check_modes(options: argparse.Namespace, bench: Bench) -> None:
    """Raise ValueError for flags that do not go together."""
    if options.calibrate and options.normalize:
        raise ValueError("--calibrate keeps a new scale and --normalize uses the one kept. Run one after the other.")
    share = options.think_agreement
    if share is not None and not (options.calibrate and 0 < share <= 1):
        raise ValueError(f"think_agreement is {share}. Give a share up to 1, with --calibrate.")
    if options.think_when_unsure and (options.calibrate or options.normalize):
        raise ValueError("--think_when_unsure mixes two scales. Leave out --calibrate and --normalize.")
    if share is None and not options.think_when_unsure:
        return
    if options.mask_cot or not bench.is_paired:
        raise ValueError("thinking when unsure is for pairs, and needs thoughts. Leave out mask_cot, or its flags.")


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
    taken = [column for column in added_columns(bench, has_errors=options.num_thoughts > 1) if column in bench.columns]
    if taken:
        raise CsvError(bench.path, [f"it has the column(s) {', '.join(taken)} already; rename them"])


def describe_run(
    options: argparse.Namespace, settings: ScoringSettings, checkpoint: PolicyCheckpoint
) -> dict[str, object]:
    """What the rewards depend on, JSON values; the model by its content, so that it may be moved."""
    choose_prompt_length(checkpoint, settings)
    affecting = {name: getattr(settings, name) for name in AFFECTING_IF_SET}
    changed = {name: value for name, value in affecting.items() if value != getattr(ScoringSettings, name)}
    seed = {"seed": settings.seed} if settings.num_thoughts > 1 else {}
    return {
        "weights": fingerprint(find_model(options.model_ckpt), checkpoint),
        "data": hashlib.blake2b(Path(options.data_path).read_bytes(), digest_size=8).hexdigest(),
        "bench_type": options.bench_type,
        "backend": settings.backend,
        "video": asdict(choose_budget(checkpoint, settings)),
        "format_prompt": checkpoint.format_prompt,
        **{name: getattr(settings, name) for name in AFFECTING_REWARDS},
        "precision": str(resolve_precision(settings.precision, choose_device())).removeprefix("torch."),
        **changed,
        **seed,
    }


def _score_missing(
    source: ModelSource, bench: Bench, journal: Journal, options: argparse.Namespace, rule: ThinkMargin | None
) -> Bench:
    """Score what the journal lacks; returns the benchmark that is reported: by a rule, some pairs do not think."""
    needs_masked = rule is not None or options.think_agreement is not None
    benches = [mask_bench(bench), bench] if needs_masked else [bench]
    num_gpus, num_missing = torch.cuda.device_count(), sum(len(_find_missing(each, journal)) for each in benches)
    num_workers = min(options.num_workers or max(1, num_gpus), max(1, num_missing))
    with Engines(source, num_gpus=num_gpus, num_workers=num_workers) as engines:
        if needs_masked:
            _score_items(engines, benches[0], journal)
        if rule is not None:
            bench = mix_bench(bench, journal.rewards, rule.margin)
        _score_items(engines, bench, journal)
    return bench


def _find_missing(bench: Bench, journal: Journal) -> list[str]:
    return [name for name in bench.items if name not in journal.rewards and name not in bench.missing]


def _score_items(engines: Engines, bench: Bench, journal: Journal) -> None:
    journal.failures.update(bench.missing)
    names, on = _find_missing(bench, journal), "GPU(s)" if engines.num_gpus else "CPU engine(s)"
    logger.info(
        "%s: %d rows, %d duplicate, over %d videos, %d not found; %d scored before, %d to score on %d %s",
        bench.bench_type, len(bench.rows), bench.num_duplicate_rows, len(bench.items), len(bench.missing),
        sum(name in journal.rewards for name in bench.items), len(names), engines.num_workers, on,
    )  # fmt: skip
    if not names:
        return
    with progress(total=len(names), description="score", unit="video") as bar:
        for outcome in engines.score([bench.items[name] for name in names]):
            journal.add(outcome)
            bar.set_postfix(failed=len(journal.failures), refresh=False)
            bar.update()
