"""What the repository holds that a README may name: files, shell scripts and what they pass on, make targets, pins."""

import posixpath
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STAGES = ("cold_start", "dual_rl", "figure")
WRITTEN = ("cold_start/output", "cold_start/results", "dual_rl/results", "figure/output", "figure/results", ".venv")
"""What programs write, and what is therefore not there in a fresh checkout."""

USERS = ("my", "~")
"""First part of paths that belong to the reader: `my/train.csv`, `~/toy_world`."""

_PLACEHOLDER = re.compile(r"\.\.\.|\$|(?:^|[/_])[A-Z][A-Z0-9_]*(?=$|[/._])")
_HUB_NAME = re.compile(r"Qwen/[\w.-]+")
_RUN_BY_SCRIPT = re.compile(
    r"(?:bash|python3?)\s+\"?(?:\$\w+/)?(?P<script>[\w./]+\.(?:py|sh))|-m (?P<module>[\w.]+)"
    r"|\$here/(?P<launched>[\w./]+\.py)"
)


@dataclass(frozen=True)
class Target:
    """What a script or make target hands further arguments to: a file from the root, or a `module` run in `folder`."""

    file: str = ""
    folder: str = "."
    module: str = ""


class Repository:
    """Looks things up in a checkout; paths are as seen from its root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def is_file(self, file: str) -> bool:
        return (self.root / file).is_file()

    def exists(self, path: str) -> bool:
        """Whether a file, a folder or, with wildcards, anything of this name is there."""
        return any(True for _ in self.root.glob(path)) if "*" in path else (self.root / path).exists()

    def is_missing(self, argument: str, folder: str) -> bool:
        """Whether an argument of a command names a file or folder of the repository that is not there.

        Names with a slash do, unless they are absolute, the reader's (USERS), written by programs (WRITTEN), a model
        on the hub, or have a placeholder in them (`...`, `EXP_NAME`).
        """
        path = argument.partition("=")[2] if re.match(r"[\w.]+=", argument) else argument
        path = re.sub(r"(?<=\.py):\w+$", "", path)
        if "/" not in path or re.search(r"[\s{}:@]", path) or path.startswith(("/", "-")):
            return False
        place = join(folder, path)
        is_elsewhere = path.split("/")[0] in USERS or _PLACEHOLDER.search(path) or _HUB_NAME.fullmatch(path)
        return not is_elsewhere and not is_below(place, WRITTEN) and not self.exists(place)

    def is_known_name(self, path: str, readme: str) -> bool:
        """Whether a path in the text of a README is one of the repository, or one that its programs read or write.

        It may be seen from any folder between the README and the root; a name alone may lie anywhere in the README's
        stage. Scripts must be there. For other names it is enough that the last definite part of them is written in
        the code of a stage: `rm_head.pth`, `global_step_N/state.json`.
        """
        path = path.rstrip("/")
        folders = [str(parent) for parent in Path(readme).parents]
        places = [join(folder, path) for folder in folders]
        if any(self.exists(place) or is_below(place, WRITTEN) for place in places):
            return True
        if "/" not in path and path in self.names:
            return True
        if path.endswith((".py", ".sh")):
            return False
        parts = [part for part in path.split("/") if not re.search(r"[*]|^[A-Z]{2,}(\.\w+)?$|_N$", part)]
        return not parts or self.is_written_in_code(parts[-1])

    def is_written_in_code(self, name: str) -> bool:
        """Whether code outside of tests has `name` in it as a whole word, or ending a name: `.samples.jsonl`."""
        word = re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)")
        ending = name[name.index(".") :] if name.count(".") > 1 else None
        if any(word.search(text) or (ending and ending in text) for text in self.code.values()):
            return True
        return name in self._listed_names

    @cached_property
    def _listed_names(self) -> set[str]:
        """File names that code gives as a list: `bench_{tabench,genai}.csv` is two."""
        lists = [found for text in self.code.values() for found in re.findall(r"(\w+)\{([\w,]+)\}(\.\w+)", text)]
        return {f"{start}{name}{end}" for start, names, end in lists for name in names.split(",")}

    @cached_property
    def names(self) -> set[str]:
        """The names of all files of the stages."""
        files = [path for stage in STAGES for path in (self.root / stage).rglob("*") if path.is_file()]
        return {path.name for path in files if not is_below(str(path.relative_to(self.root)), WRITTEN)}

    @cached_property
    def code(self) -> dict[str, str]:
        """The text of every Python and shell file of the stages but their tests, by path."""
        files = [path for stage in STAGES for kind in ("*.py", "*.sh") for path in (self.root / stage).rglob(kind)]
        names = [str(path.relative_to(self.root)) for path in sorted(files)]
        return {name: self.text(name) for name in names if "/tests/" not in name and not is_below(name, WRITTEN)}

    def reads_variable(self, script: str, variable: str) -> bool:
        """Whether a shell script, or one that it calls, reads a variable."""
        text = self.text(script)
        if re.search(rf"\$\{{?{variable}\b", text):
            return True
        called = [join(posixpath.dirname(script), name) for name in called_scripts(text)]
        return any(self.is_file(name) and self.reads_variable(name, variable) for name in called if name != script)

    def forwarded_to(self, script: str) -> Target | None:
        """What a shell script passes its own arguments on to, following further scripts; None if it takes none."""
        for line in re.sub(r"\\\n\s*", " ", self.text(script)).splitlines():
            if '"$@"' in line and (match := _RUN_BY_SCRIPT.search(line)):
                return self._resolve(match, stage=script.split("/")[0], script=script)
        return None

    def make_recipe(self, folder: str, name: str) -> str | None:
        """The recipe of a target of the folder's Makefile; None if there is none."""
        makefile = join(folder, "Makefile")
        match = re.search(rf"^{name}:.*\n((?:\t.*\n)*)", self.text(makefile), re.M) if self.is_file(makefile) else None
        return match[1] if match else None

    def make_forwards_to(self, recipe: str) -> Target | None:
        """What the recipe of a target in the root's Makefile passes ARGS on to."""
        for line in recipe.splitlines():
            if "$(ARGS)" in line and (match := _RUN_BY_SCRIPT.search(line)):
                return self._resolve(match, stage=".", script="Makefile")
        return None

    def _resolve(self, match: re.Match, *, stage: str, script: str) -> Target | None:
        if match["module"]:
            return Target(folder=stage, module=match["module"])
        if match["launched"]:
            return Target(file=join(posixpath.dirname(script), match["launched"]))
        file = join(stage, match["script"])
        return self.forwarded_to(file) if file.endswith(".sh") else Target(file=file)

    def has_test(self, words: str, places: list[str]) -> bool:
        """Whether a test file or function below `places` has `words` in its name."""
        files = [path for place in places for path in [self.root / place, *(self.root / place).rglob("test_*.py")]]
        texts = {path.name: path.read_text(encoding="utf-8") for path in files if path.is_file()}
        return any(words in name or re.search(rf"def test_\w*{words}", text) for name, text in texts.items())

    @cached_property
    def pins(self) -> dict[str, str]:
        """Version of every package that a requirement file pins."""
        texts = [self.text(str(path.relative_to(self.root))) for path in self.root.glob("*/requirements*.txt")]
        return dict(re.findall(r"^([\w.-]+)==([^\s;+]+)", "\n".join(texts), re.MULTILINE))


def join(folder: str, name: str) -> str:
    """A path from the root, for a name as seen from `folder`."""
    return posixpath.normpath(posixpath.join(folder, name))


def is_below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def called_scripts(text: str) -> list[str]:
    """Names of the shell scripts in a script, as seen from its own folder."""
    return re.findall(r"(?:\$\w+/)?([\w./]+\.sh)\b", text)


def heading_anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown text, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
