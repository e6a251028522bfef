"""Runs commands of the READMEs, shortened, on a CPU: what a newcomer types does what it says.

A command is looked up in its README, so that nothing is run that no README has; RUNS says which of its words are put
in place of others and which are added, to make it short and to write elsewhere. Only checked (test_readmes.py) and not
run: installation, `make` (tests of their own run the quick start's scripts), training at full size and on GPUs, the
benchmarks of 8B models, serving and its clients, vLLM and Ray clusters (stage 2's tests run them), chains of thought
from a large model, and the training of the tiny base model.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from evidence_support import make_content
from readmes.checks import find_readmes
from readmes.text import Piece, read_pieces

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ("datasets/train/videos/example_0_a.mp4", "datasets/train/videos/example_0_b.mp4")
CHECKPOINT = "{folder}/stage1/checkpoint-1"
GENERATION = {
    "step": 20, "pair_id": 0, "side": "A", "sample": 0, "reward/overall": 0.5, "prompt": "Judge <video>",
    "response": '<answer>{"dimensional_scores": {"style": 1}}</answer>', "head_reward": 0.1,
    "answer": '<answer>{"video_1_scores": {"style": 2}, "video_2_scores": {"style": 0}}</answer>',
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A command or Python snippet of `readme` that begins with `start`, variables in front apart, and how it is run.

    `swap`: words (of a snippet: texts) and what stands in their place. `add`, `variables`: further words, variables.
    `needs`: runs that come before. `says`: part of the output. `writes`: a file in `folder`. `in_copy`: run in a copy
    of figure/ and of what it imports, as it writes beside itself.
    """

    readme: str
    start: str
    swap: dict[str, str] = field(default_factory=dict)
    add: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    says: str = ""
    writes: str = ""
    in_copy: bool = False


RUNS = {
    "check_csv": Run("cold_start/README.md", "python -m infer_utils.check_csv", says="4 pairs"),
    "train": Run(
        "cold_start/README.md",
        "bash train.sh",
        add=("--max_steps", "1", "--save_epochs", "1"),
        variables={"EVAL_DATA": "datasets/train/example.csv", "OUTPUT_DIR": "{folder}/stage1", "NUM_GPUS": "0"},
        writes="stage1/checkpoint-1/rm_head.pth",
    ),
    "score": Run(
        "cold_start/README.md",
        "python -m infer_utils.score",
        swap={"output/checkpoint-100": CHECKPOINT, "clip.mp4": CLIPS[0]},
        add=("--max_new_tokens", "8"),
        needs=("train",),
    ),
    "scorer": Run(
        "cold_start/README.md",
        "from infer_utils import RewardScorer",
        swap={"output/checkpoint-100": CHECKPOINT, "a.mp4": CLIPS[0], "b.mp4": CLIPS[1], "cot_a, cot_b": "'a', 'b'"},
        needs=("train",),
    ),
    "evaluate": Run(
        "cold_start/README.md",
        "python -m infer_utils.evaluate",
        swap={
            "output/checkpoint-100": CHECKPOINT,
            "my/eval.csv": "datasets/train/example.csv",
            "after.json": "{folder}/after.json",
        },
        add=("--max_new_tokens", "8"),
        needs=("train",),
        writes="after.json",
    ),
    "merge": Run(
        "cold_start/README.md",
        "python -m infer_utils.merge",
        swap={"output/checkpoint-100": CHECKPOINT, "output/merged": "{folder}/merged"},
        needs=("train",),
        writes="merged/rm_head.pth",
    ),
    "example": Run(
        "cold_start/datasets/train/README.md",
        "python datasets/make_toy_world.py --example",
        swap={"datasets/train": "{folder}/example"},
        writes="example/example.csv",
    ),
    "world": Run(
        "cold_start/datasets/eval/README.md",
        "python datasets/make_toy_world.py --output ~/toy_world",
        swap={"~/toy_world": "{folder}/world"},
        add=("--train_pairs", "8", "--eval_pairs", "8"),
        writes="world/bench_tabench.csv",
    ),
    "held out": Run(
        "cold_start/datasets/eval/README.md",
        "python datasets/make_toy_world.py --output ~/toy_world --in_domain_pairs",
        swap={"~/toy_world": "{folder}/three_sets", "200": "2"},
        add=("--train_pairs", "4", "--eval_pairs", "2"),
        writes="three_sets/bench_held_out.csv",
    ),
    "clips": Run(
        "cold_start/datasets/eval/README.md",
        "python datasets/make_best_of_n.py",
        swap={"~/best_of_n": "{folder}/clips"},
        add=("--prompts", "2", "--clips", "2"),
        writes="clips/truth.csv",
    ),
    "benchmark": Run(
        "README.md",
        "bash dual_rl/inference.sh",
        swap={
            "dual_rl/results/quickstart/global_step_60": CHECKPOINT,
            "cold_start/output/quickstart/world/bench_tabench.csv": "{folder}/world/bench_tabench.csv",
        },
        add=("--backend", "hf", "--max_new_tokens", "200", "--report", "{folder}/page.html"),
        variables={"OUTPUT": "{folder}/bench.csv"},
        needs=("train", "world"),
        says="accuracy without ties",
        writes="page.html",
    ),
    "text_score": Run(
        "dual_rl/baselines/README.md",
        "python baselines/text_score.py",
        swap={"OUTPUT.csv": "{folder}/bench.csv"},
        needs=("benchmark",),
    ),
    "best_of_n": Run(
        "dual_rl/README.md",
        "python examples/best_of_n.py",
        swap={"CHECKPOINT": CHECKPOINT, "my/clips": "{folder}/clips", "best.csv": "{folder}/best.csv"},
        add=("--backend", "hf", "--max_new_tokens", "8"),
        needs=("train", "clips"),
        writes="best.csv",
    ),
    "summarize_run": Run("dual_rl/README.md", "python examples/summarize_run.py benchmarks", says="pair accuracy"),
    "html_report": Run(
        "dual_rl/README.md",
        "python -m verl.inference.html_report",
        swap={"results/mine/generations.jsonl": "{folder}/generations.jsonl", "page.html": "{folder}/thoughts.html"},
        writes="thoughts.html",
    ),
    "predict": Run("dual_rl/README.md", "python benchmarks/predict_8b.py", says="times as many"),
    "draw_best_of_n": Run("dual_rl/README.md", "python ../figure/draw_best_of_n.py", says="N=8", in_copy=True),
    "draw_evidence": Run("figure/README.md", "python figure/draw_evidence.py", says="## Claims", in_copy=True),
}


class Workshop:
    """Runs each of RUNS once, what it needs first, and keeps what was written in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {}
        self.pieces = [piece for name, text in find_readmes(ROOT).items() for piece in read_pieces(name, text, ROOT)]
        ignored = shutil.ignore_patterns("results", "output*", "tests", "__pycache__")
        for name in ("figure", "dual_rl"):
            shutil.copytree(ROOT / name, folder / "copy" / name, ignore=ignored)
        (folder / "copy" / "figure" / "results").mkdir()
        (folder / "copy" / "figure" / "results" / "small.json").write_text(json.dumps(make_content()))
        (folder / "generations.jsonl").write_text(json.dumps(GENERATION) + "\n")

    def run(self, name: str) -> str:
        """The output of a run; what fails names the command."""
        if name not in self.outputs:
            run = RUNS[name]
            for before in run.needs:
                self.run(before)
            self.outputs[name] = self._execute(run)
        return self.outputs[name]

    def _execute(self, run: Run) -> str:
        piece = self._find(run)
        words, variables = self._words(piece, run)
        root = self.folder / "copy" if run.in_copy else ROOT
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
        result = subprocess.run(
            words, cwd=root / piece.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, f"{piece.place}: {shlex.join(words)}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def _find(self, run: Run) -> Piece:
        for piece in self.pieces:
            command = piece.command
            text = " ".join([command.program, *command.arguments]) if command else piece.text
            if piece.readme == run.readme and piece.kind in ("shell", "python") and text.startswith(run.start):
                return piece
        raise AssertionError(f"{run.readme} no longer has a command that begins with {run.start}")

    def _words(self, piece: Piece, run: Run) -> tuple[list[str], dict[str, str]]:
        """What is started, and the variables in front of it."""
        swap = {word: self._fill(other) for word, other in run.swap.items()}
        if piece.kind == "python":
            text = piece.text
            for word, other in swap.items():
                assert word in text, f"{piece.place} has no {word}"
                text = text.replace(word, other)
            return [sys.executable, "-c", text], {}
        command = piece.command
        given = {*command.arguments, *command.variables.values()}
        assert not swap.keys() - given, f"{piece.place} has no {sorted(swap.keys() - given)}"
        words = [swap.get(word, word) for word in command.arguments]
        words = [match for word in words for match in self._expand(word, piece.folder)]
        variables = {name: swap.get(value, value) for name, value in command.variables.items()}
        variables |= {name: self._fill(value) for name, value in run.variables.items()}
        program = sys.executable if command.program == "python" else command.program
        return [program, *words, *map(self._fill, run.add)], variables

    def _fill(self, text: str) -> str:
        return text.replace("{folder}", str(self.folder))

    @staticmethod
    def _expand(word: str, folder: str) -> list[str]:
        matches = sorted((ROOT / folder).glob(word)) if "*" in word else []
        return [str(path.relative_to(ROOT / folder)) for path in matches] or [word]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("readmes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_command_of_a_readme_runs(workshop, name):
    output = workshop.run(name)
    assert RUNS[name].says in output
    assert (workshop.folder / RUNS[name].writes).exists(), RUNS[name].writes
