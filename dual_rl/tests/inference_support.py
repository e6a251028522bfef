"""What the tests of inference share: benchmarks over the example's clips, and runs of it in processes of their own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scoring.bench_csv import BENCH_FORMATS, BenchType
from scoring.benchmark import JOURNAL_SUFFIX
from toy_world.tables import write_table
from training_support import DUAL_RL, RUN_TIMEOUT, forks
from verl.model.reward_files import save_head

VIDEOS = DUAL_RL / "data" / "videos"
CLIPS = sorted(path.name for path in VIDEOS.glob("*.mp4"))
PROMPTS = ("a red circle", "a blue star falls", 'two "cats", and\na dog')
LABEL_COLUMNS = {
    "tabench": ("answer",),
    "videoalign": ("VQ", "Overall"),
    "genai": ("vote_type",),
    "react": ("GSB_style", "GSB_overall"),
    "videofeedback": (),
}
LABELS = ("A", "B", "same", "A", "invalid")
GENERATORS = ("sora", "kling", "wan")
SMALL = {"backend": "hf", "batch_size": 2, "max_new_tokens": 8, "num_threads": 1}

Row = dict[str, str]
Pair = tuple[str, str, str]
"""Names of the clips A and B, and the prompt."""


def make_row(bench_type: BenchType, pair: Pair, number: int) -> Row:
    """Row `number` of a benchmark, with all that its format can have; of single videos only A is there."""
    form = BENCH_FORMATS[bench_type]
    row = {column: f"videos/{clip}" for column, clip in zip(form.video_columns, pair[:2], strict=False)}
    row |= {column: GENERATORS[(number + side) % 3] for side, column in enumerate(form.model_columns)}
    row |= {column: LABELS[(number + place) % 5] for place, column in enumerate(LABEL_COLUMNS[bench_type])}
    return {"id": f"{number:03}", **row, "prompt": pair[2], "note": f' "{number}",\nnot read '}


def all_pairs(prompts: Sequence[str] = PROMPTS, *, clips: Sequence[str] = CLIPS) -> list[Pair]:
    """Every clip with its neighbour, round the circle, for every prompt: each video stands in two rows."""
    return [(clip, clips[(place + 1) % len(clips)], prompt) for prompt in prompts for place, clip in enumerate(clips)]


def copy_videos(folder: Path, *, broken: Sequence[str] = ()) -> None:
    """The clips into `folder`/videos, of which those named end half way."""
    shutil.copytree(VIDEOS, folder / "videos")
    for name in broken:
        content = (VIDEOS / name).read_bytes()
        (folder / "videos" / name).write_bytes(content[: len(content) // 2])


def write_head(path: Path, model: Path, *, value: float = 1.0) -> Path:
    """Another head for the model, the same `value` everywhere."""
    width = torch.load(model / "rm_head.pth", weights_only=True)["rm_head.weight"].shape[1]
    save_head(path, torch.full((1, width), value))
    return path


def change_layer(folder: Path, model: Path) -> Path:
    """The same model with other weights in one layer, neither in its head nor in its embedding."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.layers.1.mlp.down_proj.weight"] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def share_correct(rows: Sequence[Row], label: str) -> tuple[float, int]:
    """Of the pairs with a preference: the share that the rewards get right, and how many there are."""
    decided = [row for row in rows if row[label] in ("A", "B")]
    right = [(float(row["Reward_A"]) > float(row["Reward_B"])) == (row[label] == "A") for row in decided]
    return sum(right) / len(decided), len(decided)


@dataclass(frozen=True)
class Scored:
    """A finished run: exit status (negative: the signal that ended it), console, and the CSV it was asked for."""

    code: int
    output: str
    csv: Path

    @property
    def rows(self) -> list[Row]:
        with self.csv.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def json(self) -> dict:
        return json.loads(self.csv.with_suffix(".json").read_text())

    @property
    def journal_path(self) -> Path:
        return self.csv.with_suffix(JOURNAL_SUFFIX)

    @property
    def journal(self) -> list[dict]:
        """What was scored, in order, without the line that describes the run."""
        return [json.loads(line) for line in self.journal_path.read_text().splitlines()[1:]]

    @property
    def rewards(self) -> dict[str, float]:
        """By item."""
        return {entry["name"]: entry["reward"] for entry in self.journal}

    @property
    def cots(self) -> dict[str, str]:
        """By item."""
        return {entry["name"]: entry["cot"] for entry in self.journal}

    @property
    def files(self) -> tuple[bytes, bytes]:
        """The very bytes of CSV and JSON."""
        return self.csv.read_bytes(), self.csv.with_suffix(".json").read_bytes()


def assert_same(scored: Scored, whole: Scored) -> None:
    """The same thoughts about the same videos, and the same rewards but for rounding."""
    assert scored.code == 0, scored.output
    assert scored.cots == whole.cots
    assert scored.rewards == pytest.approx(whole.rewards, rel=1e-5, abs=1e-5)


def assert_tidy(scored: Scored) -> None:
    """Nothing on the console but the run's own lines: no library has anything to tell its users' users."""
    own = ("inference: ", "tabench: ", "24 rows, ", "mean reward ", "label ", "answer ", "95% ", "the best ")
    foreign = [line for line in scored.output.splitlines() if line.strip() and not line.startswith(own)]
    assert not foreign, scored.output


@dataclass(frozen=True)
class Desk:
    """A folder with the clips and a model to score with."""

    root: Path
    model: Path

    def write(self, pairs: Sequence[Pair], bench_type: BenchType = "tabench", *, name: str = "bench") -> Path:
        """A benchmark of these pairs."""
        return self.write_rows([make_row(bench_type, pair, number) for number, pair in enumerate(pairs)], name=name)

    def write_rows(self, rows: Sequence[Mapping[str, str]], *, name: str = "bench") -> Path:
        """A benchmark of these very rows."""
        videos = self.root / "videos"
        if not videos.exists():
            videos.symlink_to(VIDEOS)
        path = self.root / f"{name}.csv"
        write_table(path, list(rows))
        return path

    def arguments(self, bench: Path, bench_type: BenchType, output: str, options: Mapping[str, object]) -> list[str]:
        """The command line."""
        places = {"data_path": bench, "model_ckpt": self.model, "output": self.root / output}
        return _flags({**places, "bench_type": bench_type, **SMALL, **options})

    def start(
        self, bench: Path, bench_type: BenchType = "tabench", output: str = "out/scores.csv", **options: object
    ) -> "Scoring":
        """Start a run; it continues what is there."""
        return Scoring(self.root / output, self.arguments(bench, bench_type, output, options))

    def run(
        self, bench: Path, bench_type: BenchType = "tabench", output: str = "out/scores.csv", **options: object
    ) -> Scored:
        """A run from start to end."""
        return self.start(bench, bench_type, output, **options).wait()

    def run_script(self, bench: Path, bench_type: BenchType = "tabench", *, output: str, **options: object) -> Scored:
        """A run by inference.sh, called from the folder with paths relative to it; no options of SMALL."""
        variables = {"MODEL_CKPT": self.model, "DATA_PATH": bench.name, "BENCH_TYPE": bench_type, "OUTPUT": output}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        result = subprocess.run(
            ["bash", str(DUAL_RL / "inference.sh"), *_flags(options)],
            cwd=self.root,
            env={**environment, **{k: str(v) for k, v in variables.items()}, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
        return Scored(result.returncode, result.stdout, self.root / output)


class Scoring:
    """A run in progress: a process of its own."""

    def __init__(self, output: Path, arguments: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        descriptor, console = tempfile.mkstemp(suffix=".console", dir=output.parent)
        os.close(descriptor)
        self.console = Path(console)
        self.process = forks().Process(target=_main, args=(arguments, str(self.console)))
        self.process.start()

    def stop_at(self, num_lines: int, *, seconds: float = 0.0, number: int = signal.SIGKILL) -> None:
        """Send a signal `seconds` after the journal has `num_lines` whole lines, unless the run ends before."""
        journal = self.output.with_suffix(JOURNAL_SUFFIX)
        deadline = time.monotonic() + RUN_TIMEOUT
        while self.process.is_alive() and (not journal.is_file() or journal.read_bytes().count(b"\n") < num_lines):
            assert time.monotonic() < deadline, f"no {num_lines} lines after {RUN_TIMEOUT} s"
            time.sleep(0.001)
        time.sleep(seconds)
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self) -> Scored:
        """Its end; one that hangs is killed and fails the test."""
        self.process.join(RUN_TIMEOUT)
        output = self.console.read_text()
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the run hangs:\n{output}")
        return Scored(self.process.exitcode, output, self.output)


def _flags(options: Mapping[str, object]) -> list[str]:
    """True stands for a flag without a value."""
    parts = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items()]
    return [part for of_option in parts for part in of_option]


def _main(arguments: list[str], console: str) -> None:
    """What `python inference.py` does, with the console in a file."""
    from inference import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(arguments))
