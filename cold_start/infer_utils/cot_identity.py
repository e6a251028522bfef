"""What samples depend on: a journal with another identity is never continued."""

import hashlib
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from fingerprint import fingerprint_weights
from infer_utils.cot_plan import CollectInput, Sampling
from scored_sequence import SequenceBuilder
from vision_process import VideoBudget


def describe_samples(
    options: Namespace, data: CollectInput, sampling: Sampling, *, builder: SequenceBuilder, budget: VideoBudget
) -> dict[str, object]:
    """The identity of a run's samples. Selection, labels and the number of samples may change from run to run."""
    folder = Path(options.model)
    is_local = options.endpoint is None and folder.is_dir()
    drawing = asdict(sampling)
    del drawing["num_samples"]
    return {
        "model": folder.resolve().name if is_local else options.model,
        "weights": fingerprint_weights(folder) if is_local else None,
        "source": "vllm" if options.endpoint is None else f"endpoint, {options.send_video}",
        "sampling": drawing,
        "budget": asdict(budget),
        "data": fingerprint_data(data, builder),
    }


def fingerprint_data(data: CollectInput, builder: SequenceBuilder) -> str:
    """16 hex digits that change with the rows' order, video paths and prompts, but not with labels or scores."""
    digest = hashlib.blake2b(digest_size=8)
    for pair in data.pairs:
        videos = data.table.cells(pair.row)["videos"]
        digest.update(repr((videos, builder.render(pair.problem))).encode())
    return digest.hexdigest()
