"""Hugging Face safetensors, written and read weight by weight: never all in memory together."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def save_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int) -> torch.dtype:
    """Write one file, or files of about `shard_bytes` with an index; returns the dtype of the first weight.

    `weights`: pairs of name and whole tensor, at least one, on any device.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype = None

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        dtype = dtype or tensor.dtype
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.detach().cpu().contiguous()
        size, total = size + num_bytes, total + num_bytes
    flush()
    names = (
        [WEIGHTS_FILE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    umask = os.umask(0)  # safetensors makes files that only their owner can read
    os.umask(umask)
    for i, name in enumerate(names):
        (folder / f"shard-{i}.tmp").chmod(0o666 & ~umask)
        (folder / f"shard-{i}.tmp").rename(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def open_shard(path: Path):
    """An open safetensors file. Raises ValueError when it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights at {path} cannot be read: {error}. Copy the model folder again.") from error


def iterate_shards(folder: Path, *, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of name and weight, on the CPU in `dtype`. Raises ValueError as `open_shard` does."""
    index = folder / WEIGHTS_INDEX_FILE
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]
    for name in names:
        with open_shard(folder / name) as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                yield key, file.get_tensor(key).to(dtype)
