"""What the benchmarks of this folder share: parts in processes of their own, clocks, the card's ceilings, results."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERA, GIB = 1e12, 2**30
TINY_BASE = Path(__file__).resolve().parents[2] / "cold_start" / "model" / "tiny_base"
MATRIX = (16384, 4096, 12288)
"""Rows, inner size and columns of the largest matrix product of an 8B model's update."""

Part = Callable[[argparse.Namespace], Mapping]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the module's docstring, with `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def describe_machine() -> dict[str, str]:
    """`device` and `torch` of a result."""
    return {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", "torch": torch.__version__}


def write_result(result: Mapping, path: Path | None) -> None:
    """Write `result` to a JSON file and make its folder; do nothing for None.

    Benchmarks in several parts call it after each part, so that one that is stopped keeps what it has measured.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def run_parts(
    parts: Mapping[str, Part], chosen: Iterable[str], options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict]]:
    """Run each chosen part in a process of its own, which frees the device; yield its name and result.

    Results also stay in `folder` as NAME.json, where later parts can read them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        path = folder / f"{name}.json"
        process = multiprocessing.get_context("spawn").Process(target=_run_part, args=(parts[name], options, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{name} ended with status {process.exitcode}")
        yield name, json.loads(path.read_text())


def _run_part(function: Part, options: argparse.Namespace, path: Path) -> None:
    path.write_text(json.dumps(function(options)))
    exit_at_once()


def exit_at_once() -> None:
    """End this process without waiting for compilation's workers or vLLM's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds of the block into `seconds[name]`; the device is idle at both ends."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds[name] = time.perf_counter() - start


def reset_peak_memory() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


def measure_ceilings() -> dict[str, float]:
    """The card's own: bf16 matrix product of the model's largest shape in TFLOP/s, and device copy in GB/s."""
    if DEVICE != "cuda":
        return {}
    rows, inner, columns = MATRIX
    left = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(inner, columns, device="cuda", dtype=torch.bfloat16)
    product = _median_device_seconds(lambda: left @ right)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = _median_device_seconds(lambda: target.copy_(source))
    return {
        "matmul_tflops": 2 * rows * columns * inner / product / TERA,
        "copy_gb_per_second": 2 * source.numel() * source.element_size() / copy / 1e9,
    }


def _median_device_seconds(function: Callable, *, repeats: int = 20, warmup: int = 3) -> float:
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return sorted(seconds)[len(seconds) // 2]
