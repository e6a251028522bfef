"""Several ranks: they wait for each other longer than a collective would, and an error of several is shown once."""

import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from arguments import DataArguments, TrainingArguments
from checkpoint import load_builder
from data import load_checked_data
from stage1_support import SMALL_BUDGET, TINY_BASE, forkserver, free_port, write_pairs_csv
from utils import report_error, run_on_main_process

COLLECTIVE_SECONDS = 2
ERROR_SECONDS = 1.0
RUN_SECONDS = 120


def run_two_ranks(folder: Path, work, *arguments: object) -> list[str]:
    """Run `work(rank, *arguments)` in two processes of a group; what each of them wrote to stderr."""
    context, port = forkserver(), free_port()
    processes = [context.Process(target=run_rank, args=(rank, port, folder, work, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(RUN_SECONDS)
        process.kill()  # only one that hangs is still there
    assert [process.exitcode for process in processes] == [0, 0]
    return [(folder / f"{rank}.log").read_text() for rank in range(2)]


def run_rank(rank: int, port: int, folder: Path, work, *arguments: object) -> None:
    wait = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=wait)
    with (folder / f"{rank}.log").open("w") as sys.stderr:
        work(rank, *arguments)


def meet_errors(rank: int, messages: list[str | None]) -> None:
    """Meet the error at the rank's index in `messages`, or none and continue."""
    if messages[rank] is not None:
        report_error(ValueError(messages[rank]), seconds=ERROR_SECONDS)
    else:
        time.sleep(2 * ERROR_SECONDS)


@pytest.mark.parametrize("messages", [["bad row\n" * 1000] * 2, [None, "a file is gone"], ["here", "there"]])
def test_an_error_is_shown_once_however_many_ranks_meet_it(tmp_path, messages):
    shown = "".join(run_two_ranks(tmp_path, meet_errors, messages))
    assert shown == "".join(f"error: {message}\n" for message in dict.fromkeys(filter(None, messages)))


def check_csv(rank: int, path: Path) -> None:
    """Check a CSV that the second rank comes to late, then wait for work of the first."""
    builder = load_builder(TINY_BASE)
    time.sleep(1.5 * COLLECTIVE_SECONDS * rank)
    try:
        load_checked_data(str(path), builder, SMALL_BUDGET, data=DataArguments(), training=TrainingArguments())
    except ValueError as error:
        sys.stderr.write(str(error).partition("\n")[2])
    run_on_main_process(lambda: time.sleep(1.5 * COLLECTIVE_SECONDS))  # as merging a full model may
    dist.barrier()


def test_checks_are_shared_by_ranks_and_may_take_longer_than_a_collective(tmp_path, clips):
    videos = [repr([str(clips[0]), name]) for name in ("one.mp4", "two.mp4", str(clips[1]), "four.mp4")]
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"] * 4, videos=videos)
    for shown in run_two_ranks(tmp_path, check_csv, path):
        rows = [line.split(":")[0] for line in shown.splitlines() if "not found" in line]
        assert rows == ["  row 1", "  row 2", "  row 4"]
