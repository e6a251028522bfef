"""What the tests of inference share: benchmarks over the example's clips, and runs of it in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scoring.bench_csv import BENCH_FORMATS, BenchType
from scoring.benchmark import JOURNAL_SUFFIX
from toy_world.tables import read_table, write_table
from training_support import DUAL_RL, RUN_TIMEOUT, Process

VIDEOS = DUAL_RL / "data" / "videos"
CLIPS = sorted(path.name for path in VIDEOS.glob("*.mp4"))
PROMPTS = ("a red circle", "a blue star falls", 'two "cats", and\na dog')
LABEL_COLUMNS = {"tabench": ("answer",), "videoalign": ("VQ", "Overall"), "videofeedback": ()}
LABELS = ("A", "B", "same", "A", "invalid")
GENERATORS = ("sora", "kling", "wan")
SMALL = {"backend": "hf", "batch_size": 2, "max_new_tokens": 8, "num_threads": 1}

Row = dict[str, str]
Pair = tuple[str, str, str]
"""Names of the clips A and B, and the prompt."""


def make_row(bench_type: BenchType, pair: Pair, number: int) -> Row:
    """Row `number` of a benchmark, with all that its format can have; a row of single videos has A only."""
    form = BENCH_FORMATS[bench_type]
    row = {column: f"videos/{clip}" for column, clip in zip(form.video_columns, pair[:2], strict=False)}
    row |= {column: GENERATORS[(number + side) % 3] for side, column in enumerate(form.model_columns)}
    row |= {column: LABELS[(number + index) % 5] for index, column in enumerate(LABEL_COLUMNS[bench_type])}
    return {"id": f"{number:03}", **row, "prompt": pair[2], "note": f' "{number}",\nnot read '}


def all_pairs(prompts: Sequence[str] = PROMPTS) -> list[Pair]:
    """Every clip with its neighbour, in a circle, for every prompt: each video is in two rows."""
    return [(clip, CLIPS[(index + 1) % len(CLIPS)], prompt) for prompt in prompts for index, clip in enumerate(CLIPS)]


@dataclass(frozen=True)
class Scored:
    """A finished run: exit status (negative: the signal that ended it), console, and the CSV it was asked for."""

    code: int
    output: str
    csv: Path

    @property
    def rows(self) -> list[Row]:
        return read_table(self.csv)

    @property
    def json(self) -> dict:
        return json.loads(self.csv.with_suffix(".json").read_text())

    @property
    def journal_path(self) -> Path:
        return self.csv.with_suffix(JOURNAL_SUFFIX)

    @property
    def journal(self) -> dict[str, dict]:
        """What was scored, by item, in order."""
        entries = [json.loads(line) for line in self.journal_path.read_text().splitlines()[1:]]
        assert len({entry["name"] for entry in entries}) == len(entries), "scored twice"
        return {entry["name"]: entry for entry in entries}

    @property
    def rewards(self) -> dict[str, float]:
        """By item."""
        return {name: entry["reward"] for name, entry in self.journal.items()}

    @property
    def cots(self) -> dict[str, str]:
        """By item."""
        return {name: entry["cot"] for name, entry in self.journal.items()}

    @property
    def files(self) -> tuple[bytes, ...]:
        """The very bytes of CSV, JSON and journal."""
        paths = (self.csv, self.csv.with_suffix(".json"), self.journal_path)
        return tuple(path.read_bytes() for path in paths)

    def assert_mistake(self, pattern: str) -> None:
        """It failed with one message that matches `pattern`, and no traceback."""
        assert self.code == 1, self.output
        assert "Traceback" not in self.output, self.output
        assert len(re.findall(r"^error: ", self.output, re.MULTILINE)) == 1, self.output
        assert re.search(rf"^error: .*{pattern}", self.output, re.MULTILINE), self.output


@dataclass(frozen=True)
class Desk:
    """A folder with the clips and a model to score with."""

    root: Path
    model: Path

    def write(self, rows: Sequence[Pair | Row], bench_type: BenchType = "tabench", *, name: str = "bench") -> Path:
        """A benchmark of these pairs, or of these very rows."""
        videos = self.root / "videos"
        if not videos.exists():
            videos.symlink_to(VIDEOS)
        path = self.root / f"{name}.csv"
        made = [make_row(bench_type, row, n) if isinstance(row, tuple) else row for n, row in enumerate(rows)]
        write_table(path, made)
        return path

    def flags(self, bench: Path, output: str, **options: object) -> list[str]:
        """The command line of a small run; `options` win."""
        paths = {"data_path": bench, "model_ckpt": self.model, "output": self.root / output}
        return make_flags({**paths, "bench_type": "tabench", **SMALL, **options})

    def start(
        self, bench: Path, bench_type: BenchType = "tabench", output: str = "out/scores.csv", **options: object
    ) -> "Scoring":
        """Start a run; it resumes what is there."""
        return Scoring(self.root / output, self.flags(bench, output, bench_type=bench_type, **options))

    def run(
        self, bench: Path, bench_type: BenchType = "tabench", output: str = "out/scores.csv", **options: object
    ) -> Scored:
        """A run from start to end."""
        return self.start(bench, bench_type, output, **options).wait()

    def run_script(self, bench: Path, bench_type: BenchType = "tabench", *, output: str, **options: object) -> Scored:
        """A run by inference.sh, from the folder and with paths relative to it; without SMALL."""
        variables = {
            "MODEL_CKPT": str(self.model),
            "DATA_PATH": bench.name,
            "BENCH_TYPE": bench_type,
            "OUTPUT": output,
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        result = subprocess.run(
            ["bash", str(DUAL_RL / "inference.sh"), *make_flags(options)],
            cwd=self.root,
            env={**environment, **variables, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
        return Scored(result.returncode, result.stdout, self.root / output)


class Scoring(Process):
    """A run of inference.py in progress."""

    def __init__(self, output: Path, arguments: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        descriptor, console = tempfile.mkstemp(suffix=".console", dir=output.parent)
        os.close(descriptor)
        super().__init__("inference", arguments, Path(console), {})

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
        return Scored(*self.wait_for_end(), self.output)


def make_flags(options: Mapping[str, object]) -> list[str]:
    """Command line; True is a flag without a value."""
    parts = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items()]
    return [part for of_option in parts for part in of_option]
