"""Several ranks in processes of their own, without Ray: each runs the cases of `jobs.pt` one after the other.

    rank_script.py FOLDER RANK WORLD_SIZE PORT MODEL

writes what becomes of each case to FOLDER/NAME_RANK.pt; `Ranks` starts them all.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from training_support import DUAL_RL, free_port
from update_support import Bench
from verl.workers.parallel import join_process_group

TIMEOUT_SECONDS = 400


class Ranks:
    """Processes that run cases beside the tests; `outcome` waits for one of them."""

    def __init__(self, folder: Path, model: Path, jobs: dict[str, tuple], *, world_size: int = 2) -> None:
        folder.mkdir()
        self.folder = folder
        torch.save(jobs, folder / "jobs.pt")
        arguments = [str(world_size), str(free_port()), str(model)]
        environment = {**os.environ, "PYTHONPATH": f"{DUAL_RL}{os.pathsep}{DUAL_RL / 'tests'}", "OMP_NUM_THREADS": "1"}
        with (folder / "log.txt").open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, __file__, str(folder), str(rank), *arguments],
                    env=environment, stdout=log, stderr=subprocess.STDOUT,
                )
                for rank in range(world_size)
            ]  # fmt: skip

    def wait(self) -> None:
        for process in self.processes:
            assert process.wait(TIMEOUT_SECONDS) == 0, (self.folder / "log.txt").read_text()

    def outcome(self, name: str, rank: int = 0):
        self.wait()
        return torch.load(self.folder / f"{name}_{rank}.pt", weights_only=False)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run_jobs(folder: Path, model: Path, *, index: int, world_size: int, port: int) -> None:
    """What rank `index` does."""
    rank = join_process_group(index=index, world_size=world_size, address="127.0.0.1", port=port)
    bench = Bench(model, rank)
    for name, (method, arguments) in torch.load(folder / "jobs.pt", weights_only=False).items():
        result = getattr(bench, method)(*arguments)
        unfinished = folder / f"unfinished_{index}"
        torch.save(result, unfinished)
        unfinished.rename(folder / f"{name}_{index}.pt")
    dist.destroy_process_group()  # gloo's threads must not outlive it


if __name__ == "__main__":
    numbers = dict(zip(("index", "world_size", "port"), map(int, sys.argv[2:5]), strict=True))
    run_jobs(Path(sys.argv[1]), Path(sys.argv[5]), **numbers)
