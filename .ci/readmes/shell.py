"""Checks the commands of READMEs: scripts, modules, targets and files that are there, variables that something reads.

Programs of others (conda, curl, openssl, pip, ray) are taken as they stand, apart from the files, environments and
versions that they are given.
"""

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from itertools import pairwise

from readmes.commands import Command
from readmes.files import Repository, Target, join
from readmes.text import Piece

ENVIRONMENT = frozenset(("CUDA_VISIBLE_DEVICES", "PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"))
"""Variables that CUDA, Python and Ray read."""

SETTINGS_PROGRAM = "dual_rl/verl/trainer/main.py"
"""The program that takes settings, key=value, in place of flags."""

PACKAGES = ("infer_utils", "verl")
"""Whose programs are run as modules, `python -m`; all others are scripts."""

_HAS_PARSER = re.compile(r"ArgumentParser|\bparse_(?:arguments|options)\b")

Finding = str | dict
"""A problem in words, or a question to the probe."""


def check_command(piece: Piece, repository: Repository) -> Iterator[Finding]:
    """Everything that is wrong with one command of a shell."""
    command, folder = piece.command, piece.folder
    if command.program not in ("bash", "make"):
        yield from _check_environment(piece)
    if command.program in ("python", "bash"):
        missing = [word for word in command.arguments[1:] if repository.is_missing(word, folder)]
        yield from (f"{word}: no such file or folder in {folder}" for word in missing)
    match command.program:
        case "python":
            yield from _check_python(piece, repository)
        case "bash":
            yield from _check_script(command, folder, repository)
        case "make":
            yield from _check_make(command, folder, repository)
        case "pip" | "conda":
            yield from _check_installation(command, folder, repository)
        case "cd" | "source":
            if any(repository.is_missing(f"./{word}", folder) for word in command.arguments):
                yield f"{command.program} {' '.join(command.arguments)}: not there in {folder}"
        case "" | "curl" | "export" | "openssl" | "ray":
            pass
        case _:
            yield f"{command.program}: not a program that commands.py knows"


def _check_environment(piece: Piece) -> Iterator[str]:
    """Variables that are exported or stand before a program that is no script of ours; alone, they must be used."""
    command = piece.command
    exported = command.arguments if command.program == "export" else ()
    for name in (*command.variables, *(word.partition("=")[0] for word in exported)):
        is_used = command.program == "" and re.search(rf"\$\{{?{name}\b", piece.text)
        if name not in ENVIRONMENT and not is_used:
            yield f"{name}: nothing reads this variable"


def _check_python(piece: Piece, repository: Repository) -> Iterator[Finding]:
    command, folder = piece.command, piece.folder
    words = list(command.arguments)
    if words[:2] == ["-m", "pytest"]:
        yield from _check_pytest(words[2:], folder, repository)
        return
    path = command.variables.get("PYTHONPATH", piece.python_path)
    folders = [join(folder, entry) for entry in path.split(":") if entry]
    if words[:1] == ["-m"] and len(words) > 1:
        file = f"{words[1].replace('.', '/')}.py"
        found = [place for place in (folder, *folders) if repository.is_file(join(place, file))]
        if found:
            target = Target(folder=found[0], module=words[1])
            yield from ask_program(target, words[2:], repository, folders=folders)
        else:
            yield f"python -m {words[1]}: no such module in {folder}"
    elif words and repository.is_file(script := join(folder, words[0])):
        yield from ask_program(Target(file=script), words[1:], repository, folders=folders)
    else:
        yield f"python {words[0] if words else ''}: no such script in {folder}"


def _check_pytest(words: list[str], folder: str, repository: Repository) -> Iterator[str]:
    """Folders and files of tests are there, a marker is declared, and a test has the text after -k in its name."""
    options = dict(pairwise(words))
    paths = [word for word, before in zip(words, ["", *words], strict=False) if word[0] != "-" and before[:1] != "-"]
    for path in paths:
        if not repository.exists(join(folder, path)):
            yield f"{path}: no such tests in {folder}"
    settings = tomllib.loads(repository.text("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    if "-m" in options and options["-m"] not in {marker.partition(":")[0] for marker in settings["markers"]}:
        yield f"-m {options['-m']}: no such marker in pyproject.toml"
    places = [join(folder, path) for path in paths] or settings["testpaths"]
    if "-k" in options and not repository.has_test(options["-k"], places):
        yield f"-k {options['-k']}: no test in {', '.join(places)} has this in its name"


def _check_script(command: Command, folder: str, repository: Repository) -> Iterator[Finding]:
    script = join(folder, command.arguments[0] if command.arguments else "")
    if not repository.is_file(script):
        yield f"bash {' '.join(command.arguments[:1])}: no such script in {folder}"
        return
    for name in command.variables:
        if name not in ENVIRONMENT and not repository.reads_variable(script, name):
            yield f"{name}: {script} does not read this variable"
    if words := list(command.arguments[1:]):
        yield from _forward(repository.forwarded_to(script), words, repository, giver=script)


def _check_make(command: Command, folder: str, repository: Repository) -> Iterator[Finding]:
    words = list(command.arguments)
    if words[:1] == ["-C"]:
        folder, words = join(folder, words[1]), words[2:]
    variables = dict(word.split("=", 1) for word in words if "=" in word) | command.variables
    for target in (word for word in words if "=" not in word):
        recipe = repository.make_recipe(folder, target)
        if recipe is None:
            yield f"make {target}: no such target in {folder}"
        elif "ARGS" in variables:
            arguments = shlex.split(variables["ARGS"])
            yield from _forward(repository.make_forwards_to(recipe), arguments, repository, giver=f"make {target}")
    for name in variables.keys() - {"ARGS"}:
        if not repository.reads_variable(".ci/setup_env.sh", name):
            yield f"{name}: make does not read this variable"


def _check_installation(command: Command, folder: str, repository: Repository) -> Iterator[str]:
    """Requirement files and conda environments are there; versions are those of the requirement files."""
    words = list(command.arguments)
    for option, file in pairwise(words):
        if option in ("-r", "-f") and not repository.is_file(join(folder, file)):
            yield f"{file}: no such file in {folder}"
        names = re.findall(r"^name: *(\S+)", _text_if_there(join(folder, "env.yaml"), repository), re.MULTILINE)
        if option == "activate" and file not in names:
            yield f"conda activate {file}: env.yaml in {folder} does not name it"
    for word in words:
        if "==" in word:
            yield from check_pin(word, repository)


def check_pin(requirement: str, repository: Repository) -> Iterator[str]:
    """`name==version` must be what a requirement file pins."""
    name, _, version = requirement.partition("==")
    if repository.pins.get(name) != version:
        yield f"{requirement}: the requirement files pin {repository.pins.get(name, 'no such package')}"


def ask_program(
    target: Target, words: list[str], repository: Repository, *, folders: Iterable[str] = (), is_complete: bool = True
) -> Iterator[Finding]:
    """Whether a program accepts `words`. `is_complete`: nothing else is given to it, so nothing required may miss."""
    file = target.file or join(target.folder, f"{target.module.replace('.', '/')}.py")
    if file == SETTINGS_PROGRAM:
        yield from ({"kind": "setting", "argument": word} for word in words)
    elif _HAS_PARSER.search(repository.text(file)):
        program = {"file": file, "folder": target.folder, "module": target.module, "path": list(folders)}
        yield {"kind": "program", "program": program, "words": words, "is_complete": is_complete}
    else:
        yield from (f"{file} takes no flags: {word}" for word in words if word.startswith("-"))


def all_programs(stage: str, repository: Repository) -> list[dict]:
    """Every program of a stage that has an argument parser, as the probe wants it."""
    programs = []
    for file, text in repository.code.items():
        if file.startswith(f"{stage}/") and "__main__" in text and _HAS_PARSER.search(text):
            is_module = file.split("/")[1] in PACKAGES
            module = file.removeprefix(f"{stage}/").removesuffix(".py").replace("/", ".") if is_module else ""
            programs.append({"file": file, "folder": stage, "module": module, "path": [stage, f"{stage}/datasets"]})
    return programs


def _forward(target: Target | None, words: list[str], repository: Repository, *, giver: str) -> Iterator[Finding]:
    """Arguments that a script or a make target passes on, beside arguments of its own."""
    if target is None:
        yield f"{giver} takes no arguments"
    elif target.module == "pytest":
        yield from _check_pytest(words, ".", repository)
    else:
        yield from ask_program(target, words, repository, is_complete=False)


def _text_if_there(file: str, repository: Repository) -> str:
    return repository.text(file) if repository.is_file(file) else ""
