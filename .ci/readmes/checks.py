"""Finds what is wrong in READMEs, and says where.

What needs a program's own argument parser, the settings of stage 2 or a Python import is asked of probe.py, which runs
once, in a process of its own, for all READMEs together.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from readmes.commands import python_call
from readmes.files import STAGES, WRITTEN, Repository, Target, heading_anchors, is_below, join
from readmes.shell import ENVIRONMENT, Finding, all_programs, ask_program, check_command, check_pin
from readmes.text import Piece, read_pieces

FLAGS_OF_OTHERS = frozenset(("--media-io-kwargs", "--trust-request-mm-kwargs", "--num-cpus"))
"""`vllm serve`, `vllm serve`, `ray start`."""


def find_readmes(root: Path) -> dict[str, str]:
    """The text of every README of the repository, by path; what programs wrote may have some too and is left out."""
    files = [root / "README.md", *(path for stage in STAGES for path in (root / stage).rglob("README.md"))]
    names = sorted(str(path.relative_to(root)) for path in files)
    return {name: (root / name).read_text(encoding="utf-8") for name in names if not is_below(name, WRITTEN)}


def find_problems(readmes: Mapping[str, str], root: Path) -> list[str]:
    """What is wrong in `readmes` (path from `root` to text), each as `README:line: what`, in order."""
    repository = Repository(root)
    pieces = [piece for readme, text in readmes.items() for piece in read_pieces(readme, text, root)]
    snippets = [{"readme": p.readme, "folder": p.folder, "text": p.text} for p in pieces if p.kind == "python"]
    found = [(piece, finding) for piece in pieces for finding in check_piece(piece, repository)]
    questions = [finding for _, finding in found if isinstance(finding, dict)]
    answers = iter(ask_probe({"root": str(root), "questions": questions, "snippets": snippets}))
    problems = [(piece, next(answers) if isinstance(finding, dict) else finding) for piece, finding in found]
    return [f"{piece.place}: {problem}" for piece, problem in problems if problem]


def ask_probe(request: dict) -> list[str | None]:
    """The probe's answers, in the order of the questions: None where all is well."""
    result = subprocess.run(
        [sys.executable, "-m", "readmes.probe"],
        input=json.dumps(request),
        cwd=Path(__file__).resolve().parents[1],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def check_piece(piece: Piece, repository: Repository) -> Iterator[Finding]:
    """Everything that is wrong with one piece, or has to be asked."""
    checks = {
        "call": _check_python,
        "flags": _check_flags,
        "link": _check_link,
        "name": _check_names,
        "partial": _check_flags,
        "path": _check_path,
        "pin": _check_pin,
        "python": _check_python,
        "settings": _check_settings,
        "shell": check_command,
        "table-variable": _check_names,
        "unreadable": _check_quotation,
        "variables": _check_names,
    }
    if piece.kind in checks:
        yield from checks[piece.kind](piece, repository)


def _check_quotation(piece: Piece, _: Repository) -> Iterator[str]:
    yield piece.text


def _check_python(piece: Piece, _: Repository) -> Iterator[Finding]:
    text = piece.text if piece.kind == "python" else python_call(piece.text)
    yield {"kind": piece.kind, "readme": piece.readme, "folder": piece.folder, "text": text}


def _check_pin(piece: Piece, repository: Repository) -> Iterator[str]:
    yield from check_pin(piece.text, repository)


def _check_path(piece: Piece, repository: Repository) -> Iterator[str]:
    if not repository.is_known_name(piece.text, piece.readme):
        yield f"{piece.text}: no such file or folder, and no program names it"


def _check_settings(piece: Piece, repository: Repository) -> Iterator[Finding]:
    """Keys and values must be those of stage 2; files may be given from the root or from the README's folder."""
    for word in shlex.split(piece.text):
        if all(repository.is_missing(word, folder) for folder in (".", piece.folder)):
            yield f"{word}: no such file"
        yield {"kind": "setting", "argument": word}


def _check_flags(piece: Piece, repository: Repository) -> Iterator[Finding]:
    """`--flag value` must be known to a program of the stage, `script.py --flag value` to the script."""
    words = shlex.split(piece.text)
    if piece.kind == "partial":
        files = [file for stage in piece.stages if repository.is_file(file := f"{stage}/{words[0]}")]
        if files:
            yield from ask_program(Target(file=files[0]), words[1:], repository, is_complete=False)
        else:
            yield f"{words[0]}: no such script in {' or '.join(piece.stages)}"
    elif words[0].partition("=")[0] not in FLAGS_OF_OTHERS:
        programs = [program for stage in piece.stages for program in all_programs(stage, repository)]
        yield {"kind": "flags", "words": words, "programs": programs, "stages": piece.stages}


def _check_names(piece: Piece, repository: Repository) -> Iterator[str]:
    """Variables must be read by a script of the stage; another name in capitals may be a column that code knows."""
    if piece.kind == "name":
        if piece.text not in ENVIRONMENT and not repository.is_written_in_code(piece.text):
            yield f"{piece.text}: no code knows this name"
        return
    scripts = [file for file in repository.code if file.endswith(".sh") and file.startswith(piece.stages)]
    for name in (word.partition("=")[0] for word in piece.text.split()):
        if name not in ENVIRONMENT and not any(repository.reads_variable(file, name) for file in scripts):
            yield f"{name}: no script of {' or '.join(piece.stages)} reads this variable"


def _check_link(piece: Piece, repository: Repository) -> Iterator[str]:
    target, _, anchor = piece.text.partition("#")
    if "://" in target:
        return
    file = join(str(Path(piece.readme).parent), target) if target else piece.readme
    if not repository.exists(file):
        yield f"link to {piece.text}: no such file"
    elif anchor and anchor not in heading_anchors(repository.text(file)):
        yield f"link to {piece.text}: no such heading"
