"""What the tests of whole runs share: a folder of toy pairs and a small model, and stage 2 as users start it."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from model_support import DUAL_RL, EXAMPLE_CSV
from toy_world.tables import read_table, write_table

SPYING_REWARD = Path(__file__).with_name("spying_reward.py")
SMALL_RUN = {
    "data.max_prompt_length": 1024,
    "data.max_response_length": 24,
    "data.rollout_batch_size": 4,
    "data.val_batch_size": 3,
    "algorithm.kl_coef": 0.01,
    "worker.actor.global_batch_size": 2,
    "worker.actor.bt_weight": 0.5,
    "worker.actor.optim.lr": 1e-3,
    "worker.actor.micro_batch_size_per_device_for_update": 2,
    "worker.rollout.name": "hf",
    "worker.rollout.n": 2,
    "worker.rollout.kv_cache_gib": 1,
    "trainer.n_gpus_per_node": 0,
    "trainer.max_steps": 3,
    "trainer.save_freq": 1,
    "trainer.logger": "[file]",
}
UNREPEATABLE = ("timing/", "perf/tokens_per_second", "perf/update_memory", "perf/rollout_memory")
RUN_TIMEOUT = 240.0


@dataclass(frozen=True)
class Run:
    """A run of stage 2 into `folder`: its exit status (negative: the signal that ended it) and console."""

    code: int
    output: str
    folder: Path

    @property
    def log(self) -> list[dict]:
        """Lines of train_log.jsonl."""
        return [json.loads(line) for line in (self.folder / "train_log.jsonl").read_text().splitlines()]

    @property
    def repeatable_log(self) -> list[dict]:
        """The log without what depends on the machine's speed."""
        return [
            {name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)} for line in self.log
        ]

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoint folders, unfinished ones included."""
        return sorted(path.name for path in self.folder.glob("global_step_*"))

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """Everything that the checkpoint of `step` holds for users, fp32."""
        actor = self.folder / f"global_step_{step}" / "actor"
        weights: dict[str, torch.Tensor] = torch.load(actor / "rm_head.pth", weights_only=True)
        for file in sorted((actor / "huggingface").glob("*.safetensors")):
            weights |= load_file(file)
        return {name: tensor.float() for name, tensor in weights.items()}


@dataclass(frozen=True)
class Workplace:
    """A folder with a small model, six pairs of toy clips, and a reward function with faults on demand."""

    root: Path
    settings: dict[str, object] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, **settings: object) -> "Workplace":
        """Pairs are other combinations of the example's clips, so that each epoch has a different order."""
        shutil.copytree(EXAMPLE_CSV.parent / "videos", root / "videos")
        rows = read_table(EXAMPLE_CSV)
        for number in range(2):
            rows.append({**rows[number], "videos": str([f"videos/example_{number}_a.mp4", "videos/example_3_b.mp4"])})
        write_table(root / "pairs.csv", rows)
        return cls(root, settings)

    @property
    def fault(self) -> Path:
        """Where the reward function reads in which call to kill a rank."""
        return self.root / "fault"

    @property
    def calls(self) -> list[list]:
        """What the reward function was called with, in order: [answer, side, response] of every response."""
        path = self.root / "calls.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # complete ones
        return [json.loads(line) for line in lines]

    def arguments(self, folder: Path, settings: Mapping[str, object]) -> list[str]:
        """The command line's arguments of a run into `folder`."""
        paths = {"log": self.root / "calls.jsonl", "fault": self.fault}
        values = {
            **SMALL_RUN,
            "data.train_files": self.root / "pairs.csv",
            "worker.reward.reward_function": f"{SPYING_REWARD}:compute_score",
            "worker.reward.reward_function_kwargs": json.dumps({name: str(path) for name, path in paths.items()}),
            "trainer.save_checkpoint_path": folder,
            **self.settings,
            **settings,
        }
        return [f"{key}={value}" for key, value in values.items()]

    def start(self, name: str = "run", settings: Mapping[str, object] | None = None) -> "Running":
        """Start a run into the folder `name`; it continues what is there."""
        return Running(self.root / name, self.arguments(self.root / name, settings or {}))

    def run(self, name: str = "run", settings: Mapping[str, object] | None = None) -> Run:
        """A run from start to end."""
        return self.start(name, settings).wait()


@cache
def forks() -> BaseContext:
    """Forks processes from one that has imported stage 2 already, which takes longer than a run of a small model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verl.trainer.main"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(DUAL_RL), before]))
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return context


class Process:
    """A command of stage 2 in progress: `main(arguments)` of `module`, in a process whose console is a file."""

    def __init__(self, module: str, arguments: list[str], console: Path) -> None:
        self.console = console
        self.process = forks().Process(target=_main, args=(module, arguments, str(console)))
        self.process.start()

    def children(self) -> dict[int, str]:
        """Names of the processes that it has started, by id."""
        return {child.pid: child.name() for child in psutil.Process(self.process.pid).children(recursive=True)}

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait_for_end(self) -> tuple[int, str]:
        """Exit status and console, again and again if need be; one that hangs is killed and fails the test."""
        self.process.join(RUN_TIMEOUT)
        output = self.console.read_text() if self.console.is_file() else ""
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the run hangs:\n{output}")
        return self.process.exitcode, output


class Running(Process):
    """A training run in progress."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder = folder
        super().__init__("verl.trainer.main", arguments, folder.with_name(f"{folder.name}.console"))

    def wait(self) -> Run:
        return Run(*self.wait_for_end(), self.folder)


def _main(module: str, arguments: list[str], console: str) -> None:
    """What `python -m module` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(DUAL_RL)
    sys.exit(import_module(module).main(arguments))


def assert_one_message(code: int, output: str, pattern: str) -> None:
    """A command ended with exit status 1 and one message, in which `pattern` is; no traceback."""
    assert code == 1, output
    assert "Traceback" not in output, output
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output
    assert re.search(rf"^error: .*{pattern}", output, re.MULTILINE), output


def wait_for(condition: Callable[[], bool], *, running: Process) -> None:
    """Wait until `condition()` holds, while `running` runs."""
    deadline = time.monotonic() + RUN_TIMEOUT
    while not condition():
        assert running.process.is_alive(), f"ended before:\n{running.console.read_text()}"
        assert time.monotonic() < deadline, f"not within {RUN_TIMEOUT} s"
        time.sleep(0.002)


def wait_until_gone(processes: set[int], *, seconds: float = 20.0) -> set[int]:
    """Those of the processes that still run after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(psutil.pid_exists, processes)):
        time.sleep(0.1)
    return {process for process in processes if psutil.pid_exists(process)}


def free_port() -> int:
    """A port that nothing listens on, outside of the range that Ray's workers take."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def largest_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference over all weights; both must have the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
