"""Takes a README apart: every command, setting, flag, path and Python snippet in it, with its line and its folder.

Where commands are run is found as a reader would:

- in the README's own folder, unless a sentence says "commands ... are run in X" for the whole of it;
- "from X" or "run in X" holds from there to the next heading, and so does a `cd`: a section is one shell.

X is "the repository root", "this folder" or a folder in backticks, as seen from the root or from the README. A Python
snippet belongs to the same folder, unless a comment says `# from X/`.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt
from markdown_it.token import Token

from readmes.commands import Command, block_kind, inline_kind, parse_commands

STAGES = {"stage 1": "cold_start", "stage 2": "dual_rl"}
"""How texts name the folders of the stages."""

_PLACE = r"(?:the\s+)?(?:(?P<root>repository\s+root)|(?P<here>this\s+folder)|(?:folder )?`(?P<folder>[\w./]+/)`)"
_STATEMENT = re.compile(rf"(?P<whole>\bcommands\b[^.]*?)?\b(?:from|run\s+in)\s+{_PLACE}", re.IGNORECASE)
_CODE = re.compile(r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)", re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_SNIPPET_FOLDER = re.compile(r"#\s*from\s+([\w./]+/)")


@dataclass(frozen=True)
class Piece:
    """One thing that a README says and that can be checked.

    `kind` is one of commands.block_kind and inline_kind, or `link`, or `table-variable` (inline code in the
    first column of a table whose head is "variable"). `folder`: where it is run, from the root. `stages`: the folders
    whose programs it may be about. `python_path`: what `export PYTHONPATH=` says, as it stands.
    """

    kind: str
    text: str
    readme: str
    line: int
    folder: str
    stages: tuple[str, ...] = ()
    command: Command | None = None
    python_path: str = ""

    @property
    def place(self) -> str:
        return f"{self.readme}:{self.line}"


def read_pieces(readme: str, text: str, root: Path) -> list[Piece]:
    """Everything that can be checked in `text`, the contents of the file `readme` (a path from `root`)."""
    reader = _Reader(readme, root)
    return list(reader.read(MarkdownIt("commonmark").enable("table").parse(text)))


class _Reader:
    """Walks over a README's tokens and keeps in mind which folder a reader's shell is in."""

    def __init__(self, readme: str, root: Path) -> None:
        self.readme = readme
        self.root = root
        self.own_folder = str(PurePosixPath(readme).parent)
        self.default = self.folder = self.own_folder
        self.python_path = ""
        self.column = -1
        self.has_variables = False

    def read(self, tokens: list[Token]) -> Iterator[Piece]:
        for token in tokens:
            if token.type == "heading_open":
                self.folder, self.python_path = self.default, ""
            elif token.type == "tr_open":
                self.column = -1
            elif token.type in ("th_open", "td_open"):
                self.column += 1
            elif token.type == "table_close":
                self.column, self.has_variables = -1, False
            elif token.type in ("fence", "code_block"):
                yield from self._read_block(token)
            elif token.type == "inline":
                yield from self._read_inline(token)

    def _read_block(self, token: Token) -> Iterator[Piece]:
        language = token.info.split()[0] if token.info.strip() else ""
        line = token.map[0] + (2 if token.type == "fence" else 1)
        kind = block_kind(language, token.content)
        if kind == "shell":
            yield from self._read_shell(token.content, line)
        elif kind == "python":
            named = _SNIPPET_FOLDER.search(token.content)
            yield self._piece(kind, token.content, line, folder=self._resolve(named[1]) if named else self.folder)
        else:
            yield self._piece(kind, token.content, line)

    def _read_shell(self, text: str, line: int) -> Iterator[Piece]:
        try:
            commands = parse_commands(text, line)
        except ValueError as error:
            yield self._piece("unreadable", f"{text.strip()}: {error}", line)
            return
        for command in commands:
            yield self._piece("shell", text, command.line, command=command)
            if command.program == "cd" and command.arguments:
                self.folder = posixpath.normpath(posixpath.join(self.folder, command.arguments[0]))
            for argument in command.arguments if command.program == "export" else ():
                if argument.startswith("PYTHONPATH="):
                    self.python_path = argument.partition("=")[2]

    def _read_inline(self, token: Token) -> Iterator[Piece]:
        content = token.content
        if self.column == 0 and content.strip().lower() == "variable":
            self.has_variables = True
        stages = self._stages(content)
        found = [match for pattern in (_STATEMENT, _CODE, _LINK) for match in pattern.finditer(content)]
        for match in sorted(found, key=lambda match: match.start("code" if "code" in match.groupdict() else 0)):
            line = token.map[0] + 1 + content[: match.start()].count("\n")
            groups = match.groupdict()
            if "target" in groups:
                yield self._piece("link", groups["target"], line)
            elif "code" in groups:
                yield from self._read_code(" ".join(groups["code"].split()), line, stages)
            else:
                self._move(groups)

    def _read_code(self, code: str, line: int, stages: tuple[str, ...]) -> Iterator[Piece]:
        if not code:
            return
        kind = inline_kind(code)
        if kind == "shell":
            before = self.folder
            yield from self._read_shell(code, line)
            self.folder = before
        elif self.has_variables and self.column == 0:
            yield self._piece("table-variable", code, line, stages=stages)
        else:
            yield self._piece(kind, code, line, stages=stages)

    def _stages(self, content: str) -> tuple[str, ...]:
        """The README's own stage and those that the paragraph or table cell names; outside of the stages, all."""
        own = self.readme.partition("/")[0]
        if own not in STAGES.values():
            return (*STAGES.values(), "figure")
        named = [folder for name, folder in STAGES.items() if name in content.lower()]
        return tuple(dict.fromkeys([own, *named]))

    def _move(self, groups: dict[str, str | None]) -> None:
        if groups["root"]:
            self.folder = "."
        elif groups["here"]:
            self.folder = self.own_folder
        else:
            self.folder = self._resolve(groups["folder"])
        if groups["whole"]:
            self.default = self.folder

    def _resolve(self, name: str) -> str:
        """A folder named in the text: from the repository root if it is there, else from the README."""
        folder = posixpath.normpath(name)
        if not folder.startswith("..") and (self.root / folder).is_dir():
            return folder
        return posixpath.normpath(posixpath.join(self.own_folder, folder))

    def _piece(self, kind: str, text: str, line: int, **more: object) -> Piece:
        given = {"folder": self.folder, "python_path": self.python_path} | more
        return Piece(kind, text, self.readme, line, **given)
