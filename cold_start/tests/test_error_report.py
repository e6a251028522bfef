"""Errors of a run of several processes: each is shown, and none once per process."""

import multiprocessing
import socket
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from utils import report_error

WAIT_SECONDS = 1.0
RUN_SECONDS = 120


def raise_errors(rank: int, folder: Path, port: int, messages: list[str | None]) -> None:
    """One of two processes that meets the error of its place in `messages`, or none and goes on."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sys.stderr = (folder / f"{rank}.log").open("w")
    if messages[rank] is not None:
        report_error(ValueError(messages[rank]), seconds=WAIT_SECONDS)
    else:
        time.sleep(2 * WAIT_SECONDS)


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        (["row 2 is bad", "row 2 is bad"], ["error: row 2 is bad\n", ""]),
        ([None, "a file is gone"], ["", "error on rank 1: a file is gone\n"]),
        (["a file is gone", None], ["error: a file is gone\n", ""]),
        (["here", "there"], ["error: here\n", "error on rank 1: there\n"]),
    ],
    ids=["of both", "of another rank", "of the first", "different ones"],
)
def test_error_is_shown_once_by_the_rank_that_met_it(tmp_path, messages, shown):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=raise_errors, args=(rank, tmp_path, port, messages)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(RUN_SECONDS)
        process.kill()  # only one that hangs is still there
    assert [process.exitcode for process in processes] == [0, 0]
    assert [(tmp_path / f"{rank}.log").read_text() for rank in range(2)] == shown


def test_error_of_a_single_process_is_shown(capsys):
    report_error(ValueError("no such file"))
    assert capsys.readouterr().err == "error: no such file\n"
