"""What a README's code says: which of it is a command, a setting or a flag, and the commands as a shell reads them."""

import ast
import re
import shlex
from dataclasses import dataclass

PROGRAMS = frozenset(("bash", "cd", "conda", "curl", "export", "make", "openssl", "pip", "python", "ray", "source"))
"""What a command may begin with; a README that needs another program adds it here, with a check if there is one."""

ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
SETTING = re.compile(r"(?:data|algorithm|worker|trainer)(?:\.(?!py$)[a-z_]+)+$|[a-z_]+(?:\.[a-z_]+)+=")
SEPARATORS = frozenset(("&&", "||", ";", "|", "&"))
SHELL_LANGUAGES = ("", "bash", "sh", "shell")

_LOOKS_LIKE_A_COMMAND = re.compile(r"^(?:\S+\s+)?\S+\.(?:py|sh)\b|\s--[a-z]", re.MULTILINE)
_PATH = re.compile(r"[\w.~*/-]+")
_SUFFIX = re.compile(r"\.(?:csv|html|jinja|jsonl?|md|mp4|png|pth|py|safetensors|sh|svg|toml|txt|yaml)$")
_CALL = re.compile(r"(?:\w+=)?(\w+(?:\.\w+)*\(.*\))")
_PIN = re.compile(r"[a-z][\w.-]*==[\d.]+")
_CAPITALS = re.compile(r"[A-Z][A-Z0-9_]+")


@dataclass(frozen=True)
class Command:
    """One command: `A=1 python -m x --y  # note` is {"A": "1"}, "python", ("-m", "x", "--y"). Variables alone: ""."""

    variables: dict[str, str]
    program: str
    arguments: tuple[str, ...]
    line: int


def parse_commands(text: str, line: int = 1) -> list[Command]:
    """The commands of a block that begins in `line`, without comments and redirections, `&&` and `;` taken apart.

    Raises ValueError where a quotation does not end.
    """
    commands = []
    for number, logical_line in _join_continuations(text, line):
        words: list[str] = []
        for token in [*_split(logical_line), ";"]:
            if token not in SEPARATORS:
                words.append(token)
            elif words:
                commands.append(_to_command(_without_redirections(words), number))
                words = []
    return commands


def block_kind(language: str, text: str) -> str:
    """`python`, `shell`, `settings` (key=value of stage 2), or `sample` for everything else, such as output.

    A block is shell when its first word, after assignments, is one of PROGRAMS, or when it looks like a command by a
    script or a flag in it: a misspelled program is then reported, not taken for output.
    """
    if language == "python":
        return "python"
    if language not in SHELL_LANGUAGES or not text.strip():
        return "sample"
    first = text.split()[0]
    if SETTING.match(first):
        return "settings"
    is_command = ASSIGNMENT.match(first) or first in PROGRAMS or _LOOKS_LIKE_A_COMMAND.search(text)
    return "shell" if is_command else "sample"


def inline_kind(text: str) -> str:
    """What a piece of inline code is; `sample` for what names nothing that could be looked up.

    `flags` (--x 1), `partial` (x.py --y), `shell`, `variables` (A=1), `settings`, `call` (Python), `pin` (x==1.0),
    `path`, `name` (in capitals: a variable or a column).
    """
    words = text.split()
    if all(ASSIGNMENT.match(word) for word in words):
        return "variables"
    if len(words) > 1 and (words[0] in PROGRAMS or ASSIGNMENT.match(words[0])):
        return "shell"
    if words[0].startswith("--"):
        return "flags"
    if len(words) > 1 and words[0].endswith((".py", ".sh")) and words[1].startswith("--"):
        return "partial"
    if SETTING.match(words[0]) and all(SETTING.match(word) for word in _quoted_words(text)):
        return "settings"
    if python_call(text):
        return "call"
    if _PIN.fullmatch(text):
        return "pin"
    if _PATH.fullmatch(text) and ("/" in text or _SUFFIX.search(text)):
        return "path"
    return "name" if _CAPITALS.fullmatch(text) else "sample"


def python_call(text: str) -> str | None:
    """The call in `x.f(a, b=1)` or `name=F(1)`, None where there is none."""
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    try:
        ast.parse(match[1], mode="eval")
    except SyntaxError:
        return None
    return match[1]


def _quoted_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _join_continuations(text: str, line: int) -> list[tuple[int, str]]:
    joined: list[tuple[int, str]] = []
    is_continued = False
    for number, part in enumerate(text.splitlines(), start=line):
        piece = part.removesuffix("\\")
        if is_continued:
            first, before = joined[-1]
            joined[-1] = (first, f"{before} {piece.strip()}")
        else:
            joined.append((number, piece))
        is_continued = piece != part
    return joined


def _split(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    return list(lexer)


def _without_redirections(words: list[str]) -> list[str]:
    return [word for before, word in zip(["", *words], words, strict=False) if not {"<", ">", ">>"} & {before, word}]


def _to_command(words: list[str], line: int) -> Command:
    variables = {}
    while words and ASSIGNMENT.match(words[0]):
        name, _, value = words[0].partition("=")
        variables[name] = value
        words = words[1:]
    return Command(variables, words[0] if words else "", tuple(words[1:]), line)
