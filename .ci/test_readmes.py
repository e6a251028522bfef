"""The READMEs can be followed: the links, paths, commands, flags, settings and imports that they name exist."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("cold_start", "dual_rl", "figure")
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
CODE = {name: (ROOT / name).read_text() for name in FILES if re.match(r"(?!.*/tests/)[a-z].*\.(py|sh)$", name)}
ALL_CODE = "\n".join(CODE.values())
PROGRAMS = [name for name, text in CODE.items() if name.endswith(".py") and "__main__" in text]
COMMAND = re.compile(r"\s*(?:[A-Z_]+=\S* +)*(?:bash|cd|export|make|python) ")
SETTING = re.compile(r"(?:data|algorithm|worker|trainer)(?:\.(?!py\b)[a-z_]+)+(?==|$)")
PATH = re.compile(r"[\w./-]+/[\w./-]*|[\w.-]+\.(?:csv|html|jinja|jsonl?|md|pth|py|safetensors|sh|txt|yaml)")
READERS_OWN = re.compile(r"^(my|~|Qwen)?/|\.venv|(^|/)(output|results)/|^bench_|[A-Z]{3}|_N\b|\.\.\.")
OF_OTHERS = ("PYTHONPATH", "CUDA_", "RAY_", "--media-io-kwargs", "--num-cpus", "--trust-request-mm-kwargs")


def find(name: str, readme: str) -> str | None:
    """The path from the root of a file or folder, as seen from above its README, from a stage or from the root."""
    paths = [(ROOT / folder / name).resolve() for folder in (*Path(readme).parents, *STAGES)]
    return next((str(path.relative_to(ROOT)) for path in paths if path.exists() and path.is_relative_to(ROOT)), None)


def find_module(module: str, file: str) -> str | None:
    """The source file of one of our modules, as `file` imports it."""
    path = module.replace(".", "/")
    return find(f"{path}.py", file) or find(f"{path}/__init__.py", file)


@cache
def source_of(program: str) -> str:
    """The text of a program and of every module of ours that it imports."""
    found, waiting = {}, [program]
    while waiting:
        name = waiting.pop()
        found[name] = CODE[name]
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", CODE[name], re.MULTILINE)
        waiting += {find_module(module, name) for module in modules} & CODE.keys() - found.keys()
    return "\n".join(found.values())


def knows(program: str, flag: str) -> bool:
    """Whether the program adds the flag to a parser, perhaps as `f"--{name}_pairs"`, or has a field of its name."""
    found = re.findall(r'"(--[\w{}-]+)"|^    (\w+): ', source_of(program), re.MULTILINE)
    patterns = ["--help", *(re.sub(r"{\w+}", r"\\w+", known or f"--{field}") for known, field in found)]
    return re.fullmatch("|".join(patterns), flag) is not None


@cache
def setting_names() -> set[str]:
    """Every setting of stage 2, as `worker.rollout.n`, and every group of settings."""
    sys.path.insert(0, str(ROOT / "dual_rl"))
    from verl.config_loading import leaf_types

    return {key for leaf, _ in leaf_types() for key in accumulate(leaf.split("."), "{}.{}".format)}


def check_word(word: str, readme: str) -> Iterator[str]:
    """What is wrong with a setting, a path or `setting=path`. The code may write the path."""
    name, _, value = word.partition("=")
    if SETTING.match(word) and name not in setting_names():
        yield f"{name}: no such setting"
    for path in filter(PATH.fullmatch, (name, value.partition(":")[0])):
        is_there = READERS_OWN.search(path) or find(path, readme) or any(file.endswith(f"/{path}") for file in FILES)
        if not is_there and path.rstrip("/").split("/")[-1] not in ALL_CODE:
            yield f"{path}: no such file, and no code writes it"


def check_command(words: list[str], readme: str) -> Iterator[str]:
    """What is wrong with one command of a shell. Nothing is run but `make -n`."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        name = words.pop(0).partition("=")[0]
        if not re.search(rf"\$\{{?{name}\b", ALL_CODE) and not name.startswith(OF_OTHERS):
            yield f"{name}: no script reads this variable"
    if words[:1] == ["make"]:
        folders = (ROOT, (ROOT / readme).parent)
        if all(
            subprocess.run(["make", "-n", *words[1:]], cwd=path, capture_output=True).returncode for path in folders
        ):
            yield "make has no such target"
    elif words[:1] in (["bash"], ["cd"], ["python"]) and words[1:3] != ["-m", "pytest"]:
        name, *given = words[1:] if words[1] != "-m" else [f"{words[2].replace('.', '/')}.py", *words[3:]]
        program = find(name, readme)
        if program is None and not READERS_OWN.search(name):
            yield f"{name}: no such file"
        called = re.findall(r"[\w/.-]+\.py\b", CODE.get(program, ""))  # what a shell script gives its arguments to
        programs = [file for file in (program, *(find(file, readme) for file in called)) if file in PROGRAMS]
        for word in given:
            if word.startswith("--") and not any(knows(file, word.partition("=")[0]) for file in programs):
                yield f"{program} does not know {word}"
            yield from check_word(word, readme) if "/" in word or "=" in word else ()


def check_code(text: str, readme: str) -> Iterator[str]:
    """What is wrong with a block or an inline piece of code that is not Python. Blocks that are output pass."""
    if COMMAND.match(text):
        for command in re.split(r"\n|&&|[|;]\s", text.replace("\\\n", " ")):
            problems = check_command(shlex.split(command, comments=True), readme)
            yield from (f"{command.strip()}: {problem}" for problem in problems)
    elif text.startswith("--"):
        flag = re.match(r"[\w-]+", text)[0]
        if not flag.startswith(OF_OTHERS) and not any(knows(file, flag) for file in PROGRAMS):
            yield f"no program knows {flag}"
    else:
        yield from check_word(text, readme)


def check_snippet(text: str, readme: str) -> Iterator[str]:
    """What is wrong with the imports of a Python snippet. A snippet that is no Python raises SyntaxError."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            ours = find_module(module, readme)
            if ours is None and importlib.util.find_spec(module.partition(".")[0]) is None:
                yield f"{module}: no such module"
            names = [alias.name for alias in node.names] if ours and isinstance(node, ast.ImportFrom) else []
            yield from (f"{module} has no {name}" for name in names if not re.search(rf"\b{name}\b", CODE[ours]))


def check_link(target: str, readme: str) -> Iterator[str]:
    name, _, anchor = target.partition("#")
    path = (ROOT / readme).parent / name if name else ROOT / readme
    headings = re.findall(r"^#+ +(.+)$", path.read_text(), re.MULTILINE) if anchor and path.exists() else []
    anchors = ["", *(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)]
    if "://" not in target and not (path.exists() and anchor in anchors):
        yield f"link to {target}: no such file or heading"


@pytest.mark.parametrize("readme", [name for name in FILES if name.endswith(".md")])
def test_a_newcomer_can_follow_the_readme(readme):
    problems: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse((ROOT / readme).read_text()):
        if token.type == "fence" and token.info == "python":
            problems += check_snippet(token.content, readme)
        elif token.type in ("fence", "code_block"):
            problems += check_code(token.content, readme)
        for child in token.children or ():
            if child.type == "code_inline":
                problems += check_code(child.content, readme)
            elif target := child.attrs.get("href") or child.attrs.get("src"):
                problems += check_link(target, readme)
    assert not problems, "\n".join(problems)
