"""Identity of a model by content: copies of a checkpoint have the same fingerprint, wherever they are."""

import hashlib
import os
from pathlib import Path

from verl.model.reward_files import PolicyCheckpoint, find_weight_files

PROBES_PER_FILE, PROBE_BYTES = 256, 4096


def fingerprint(model_path: str | os.PathLike, checkpoint: PolicyCheckpoint) -> str:
    """16 hex digits over head, `<Reward>` row, and samples of every file of weights, including a base model's.

    `checkpoint`: read from `model_path`, with the head in use.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (checkpoint.head_weight, checkpoint.reward_embedding):
        digest.update(tensor.contiguous().numpy().tobytes())
    for path in find_weight_files(model_path):
        _probe(path, digest)
    return digest.hexdigest()


def _probe(path: Path, digest) -> None:
    """Evenly spaced samples of a file that may be many gigabytes long; all of a short one."""
    size = path.stat().st_size
    stride = max(PROBE_BYTES, size // PROBES_PER_FILE)
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(PROBE_BYTES))
