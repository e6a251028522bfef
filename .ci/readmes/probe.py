"""Answers what only the programs themselves can: `python -m readmes.probe`, questions and answers as JSON.

A program is started as `python` would start it, up to the place where it parses its arguments; its parser is kept and
asked. Nothing else of it is run. All questions are answered in one process, as most of the time goes into imports that
the programs share; modules of one stage are forgotten before those of another are imported, as some have equal names.
"""

import argparse
import contextlib
import importlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from readmes.snippets import Names, check_call, check_snippet

PARSE = argparse.ArgumentParser.parse_known_args
HELP = frozenset(("-h", "--help"))


class ParserReached(BaseException):
    """Leaves a program where it is about to parse its arguments. No Exception, so that no program catches it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class RefusedError(Exception):
    """What a parser says about arguments that it does not accept."""


class Probe:
    """The questions' answers, from the checkout at `root`."""

    def __init__(self, root: Path, snippets: list[dict]) -> None:
        self.root = root
        self.snippets = snippets
        self.folders: list[str] = []
        self.parsers: dict[str, argparse.ArgumentParser | str] = {}

    def answer(self, question: dict) -> str | None:
        """None, or what is wrong."""
        match question["kind"]:
            case "program":
                problems = self._check_program(**question)
            case "flags":
                problems = self._check_flags(**question)
            case "setting":
                problems = self._check_setting(question["argument"])
            case "python":
                with self._importing_from([question["folder"]]):
                    problems = list(check_snippet(question["text"], self.root / question["folder"], Names()))
            case "call":
                problems = list(check_call(question["text"], self._names(question["readme"])))
        return "; ".join(problems) or None

    def _check_program(self, program: dict, words: list[str], is_complete: bool, **_: str) -> list[str]:
        parser = self._parser(program)
        if isinstance(parser, str):
            return [parser]
        problem = complaint(parser, words, is_complete=is_complete)
        return [f"{program['file']}: {problem}"] if problem else []

    def _check_flags(self, words: list[str], programs: list[dict], stages: list[str], **_: str) -> list[str]:
        """One program must accept all of the flags; flags without a value need only be known."""
        has_values = any(not word.startswith("--") or "=" in word for word in words)
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        complaints = []
        for program in programs:
            parser = self._parser(program)
            if isinstance(parser, str):
                return [parser]
            if any(flag not in parser._option_string_actions for flag in flags):
                continue
            problem = complaint(parser, words, is_complete=False) if has_values else None
            if problem is None:
                return []
            complaints.append(f"{program['file']}: {problem}")
        return complaints[:1] or [f"no program of {' or '.join(stages)} knows {' '.join(flags)}"]

    def _check_setting(self, argument: str) -> list[str]:
        with self._importing_from(["dual_rl"]):
            return _check_setting(argument)

    def _names(self, readme: str) -> Names:
        names = Names()
        for snippet in self.snippets:
            if snippet["readme"] == readme:
                with self._importing_from([snippet["folder"]]):
                    list(check_snippet(snippet["text"], self.root / snippet["folder"], names))
        return names

    def _parser(self, program: dict) -> argparse.ArgumentParser | str:
        """The program's parser, or why it does not get that far."""
        key = json.dumps(program)
        if key not in self.parsers:
            self.parsers[key] = self._start(program)
        return self.parsers[key]

    def _start(self, program: dict) -> argparse.ArgumentParser | str:
        file = program["file"]
        start = program["folder"] if program["module"] else os.path.dirname(file)
        with self._importing_from([start, *program["path"]]):
            sys.argv = [file]
            try:
                if program["module"]:
                    runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(self.root / file), run_name="__main__")
            except ParserReached as reached:
                return reached.parser
            except (ImportError, SystemExit) as error:
                return f"{file} does not start: {error!r}"
        return f"{file} parses no arguments"

    @contextlib.contextmanager
    def _importing_from(self, folders: list[str]) -> Iterator[None]:
        """These folders in front of sys.path, the first of them as the working directory of a module."""
        if folders != self.folders:
            self._forget_modules()
            self.folders = folders
        before = list(sys.path)
        sys.path[:] = [*(str(self.root / folder) for folder in folders), *before]
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path[:] = before

    def _forget_modules(self) -> None:
        ours = tuple(f"{self.root}/{stage}/" for stage in ("cold_start", "dual_rl", "figure"))
        files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
        packages = {name.partition(".")[0] for name, file in files.items() if file.startswith(ours)}
        for name in files:
            if name.partition(".")[0] in packages:
                del sys.modules[name]


def complaint(parser: argparse.ArgumentParser, words: list[str], *, is_complete: bool) -> str | None:
    """What `parser` says about arguments. Without `is_complete`, and with --help, none is missed; no abbreviations."""
    parts = [*parser._actions, *parser._mutually_exclusive_groups]
    required = [part.required for part in parts]
    parser.allow_abbrev = False
    parser.error = _refuse
    parser.format_help()  # a help text may be wrong by a percent sign
    if not is_complete or HELP & set(words):
        for part in parts:
            part.required = False
    try:
        _, unknown = PARSE(parser, [word for word in words if word not in HELP])
    except RefusedError as refusal:
        return str(refusal)
    finally:
        for part, was_required in zip(parts, required, strict=True):
            part.required = was_required
    return f"unknown arguments: {' '.join(unknown)}" if unknown else None


def _refuse(message: str) -> None:
    raise RefusedError(message)


@cache
def _setting_keys() -> dict[str, object]:
    return dict(importlib.import_module("verl.config_loading").leaf_types())


def _check_setting(argument: str) -> list[str]:
    """`key`, which may be a group of settings, or `key=value`, whose value must be of the key's type."""
    from verl.config_loading import parse_config

    key, separator, _ = argument.partition("=")
    if not separator:
        is_known = any(name == key or name.startswith(f"{key}.") for name in _setting_keys())
        return [] if is_known else [f"{key}: no such setting"]
    try:
        parse_config([argument])
    except ValueError as error:
        return [f"{argument}: {str(error).splitlines()[0]}"]
    return []


def _reach_parser(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
    raise ParserReached(parser)


def main() -> None:
    request = json.load(sys.stdin)
    probe = Probe(Path(request["root"]), request["snippets"])
    argparse.ArgumentParser.parse_known_args = _reach_parser
    order = sorted(range(len(request["questions"])), key=lambda number: _stage(request["questions"][number]))
    answers: list[str | None] = [None] * len(order)
    with contextlib.redirect_stdout(sys.stderr):
        for number in order:
            answers[number] = probe.answer(request["questions"][number])
    sys.stdout.write(f"{json.dumps(answers)}\n")
    sys.stdout.flush()
    os._exit(0)  # what the programs' libraries do at exit is not asked for


def _stage(question: dict) -> str:
    """Whose modules a question needs: questions are answered stage by stage."""
    program = question.get("program") or (question.get("programs") or [{}])[0]
    return (program.get("file") or question.get("folder") or "dual_rl").split("/")[0]


if __name__ == "__main__":
    main()
