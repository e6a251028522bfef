"""What the tests of inference share: benchmarks over the example's clips, and runs of it in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_support import CLIPS, DUAL_RL
from scoring.bench_csv import BENCH_FORMATS, BenchType
from scoring.benchmark import JOURNAL_SUFFIX
from toy_world.tables import read_table, write_table
from training_support import RUN_TIMEOUT, Process

VIDEOS, NAMES = CLIPS[0].parent, [clip.name for clip in CLIPS]
PROMPTS = ("a red circle", "a blue star falls", 'two "cats", and\na dog')
LABEL_COLUMNS = {"tabench": ("answer",), "videoalign": ("VQ", "Overall")}
LABELS = ("A", "B", "same", "A", "invalid")
GENERATORS = ("sora", "kling", "wan")
SMALL = {"backend": "hf", "batch_size": 2, "max_new_tokens": 8, "num_threads": 1}
OWN_LINES = (
    "inference: ",
    "tabench: ",
    "24 rows, ",
    "mean reward ",
    "label ",
    "answer ",
    "95% ",
    "the best ",
    "score: ",
)

Row = dict[str, str]
Pair = tuple[str, str, str]
"""Names of the clips A and B, and the prompt."""


def make_row(bench_type: BenchType, pair: Pair, number: int) -> Row:
    """Row `number` of a benchmark, with all that its format can have."""
    form = BENCH_FORMATS[bench_type]
    row = {column: f"videos/{clip}" for column, clip in zip(form.video_columns, pair[:2], strict=True)}
    row |= {column: GENERATORS[(number + side) % 3] for side, column in enumerate(form.model_columns)}
    row |= {column: LABELS[(number + index) % 5] for index, column in enumerate(LABEL_COLUMNS[bench_type])}
    return {"id": f"{number:03}", **row, "prompt": pair[2], "note": f' "{number}",\nnot read '}


def all_pairs(prompts: Sequence[str] = PROMPTS) -> list[Pair]:
    """Every clip with its neighbour, in a circle, for every prompt: each video is in two rows."""
    return [(clip, NAMES[(index + 1) % len(NAMES)], prompt) for prompt in prompts for index, clip in enumerate(NAMES)]


def make_flags(options: Mapping[str, object]) -> list[str]:
    """Command line; True is a flag without a value."""
    parts = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items()]
    return [part for of_option in parts for part in of_option]


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
    def journal(self) -> dict[str, dict]:
        """What was scored, by item, in order."""
        lines = self.csv.with_suffix(JOURNAL_SUFFIX).read_text().splitlines()[1:]
        entries = [json.loads(line) for line in lines]
        assert len({entry["name"] for entry in entries}) == len(entries), "scored twice"
        return {entry["name"]: entry for entry in entries}

    def of_items(self, name: str) -> dict[str, object]:
        """`reward` or `cot` by item."""
        return {item: entry[name] for item, entry in self.journal.items()}

    @property
    def foreign_lines(self) -> list[str]:
        """What libraries wrote to the console of the script."""
        return [line for line in self.output.splitlines() if line.strip() and not line.startswith(OWN_LINES)]

    @property
    def files(self) -> tuple[bytes, ...]:
        """The very bytes of CSV, JSON and journal."""
        return tuple(self.csv.with_suffix(suffix).read_bytes() for suffix in (".csv", ".json", JOURNAL_SUFFIX))


class Scoring(Process):
    """A run of inference.py in progress."""

    def __init__(self, output: Path, arguments: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        super().__init__("inference", arguments, output.with_name(f"{time.monotonic_ns()}.console"))

    def num_lines(self) -> int:
        """Whole lines of the journal."""
        journal = self.output.with_suffix(JOURNAL_SUFFIX)
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    def stop_at(self, num_lines: int, *, seconds: float = 0.0, number: int = signal.SIGKILL) -> None:
        """Send a signal `seconds` after the journal has `num_lines` whole lines, unless the run ends before."""
        while self.process.is_alive() and self.num_lines() < num_lines:
            time.sleep(0.001)
        time.sleep(seconds)
        if self.process.is_alive():
            self.signal(number)

    def wait(self) -> Scored:
        return Scored(*self.wait_for_end(), self.output)


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
        made = [make_row(bench_type, row, n) if isinstance(row, tuple) else row for n, row in enumerate(rows)]
        write_table(self.root / f"{name}.csv", made)
        return self.root / f"{name}.csv"

    def flags(self, bench: Path, output: str, **options: object) -> list[str]:
        """The command line of a small run; `options` win."""
        paths = {"data_path": bench, "model_ckpt": self.model, "output": self.root / output}
        return make_flags({**paths, "bench_type": "tabench", **SMALL, **options})

    def start(self, bench: Path, output: str = "out/scores.csv", **options: object) -> Scoring:
        """Start a run; it resumes what is there."""
        return Scoring(self.root / output, self.flags(bench, output, **options))

    def run(self, bench: Path, output: str = "out/scores.csv", **options: object) -> Scored:
        """A run from start to end."""
        return self.start(bench, output, **options).wait()

    def run_script(self, bench: Path, output: str, **options: object) -> Scored:
        """A run by inference.sh, with a relative output."""
        variables = {"MODEL_CKPT": self.model, "DATA_PATH": bench, "BENCH_TYPE": "tabench", "OUTPUT": output}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {
            **{name: str(value) for name, value in variables.items()},
            "PATH": path,
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", str(DUAL_RL / "inference.sh"), *make_flags({**SMALL, **options})]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": RUN_TIMEOUT}
        result = subprocess.run(command, cwd=self.root, env=environment, check=False, **pipes)
        return Scored(result.returncode, result.stdout, self.root / output)
