"""Every command, flag, setting, file and name in every README is there; and a README that is wrong is found out.

All READMEs, the real ones and those made up here, are checked at once: most of the time is the programs' imports.
"""

from pathlib import Path

import pytest

from readmes.checks import find_problems, find_readmes
from readmes.commands import block_kind, inline_kind, parse_commands
from readmes.text import Piece, read_pieces

ROOT = Path(__file__).resolve().parent.parent

SNIPPET = "```python\nfrom inference import RewardModel\n"
WRONG = {
    "flag of a script": ("cold_start", "    bash train.sh --loss_typo bt", "unknown arguments: --loss_typo"),
    "value of a flag": ("cold_start", "    bash train.sh --loss_type best", "invalid choice: 'best'"),
    "abbreviated flag": ("cold_start", "    python -m infer_utils.check_csv a.csv --dec", "unknown arguments: --dec"),
    "required flag": ("dual_rl", "    python serve.py --port 1", "arguments are required: --model_ckpt"),
    "flag of a script without flags": ("figure", "`python draw_evidence.py --fast`", "takes no flags: --fast"),
    "flag in the text": ("cold_start", "with `--num_sample` more", "no program of cold_start knows --num_sample"),
    "flag of the other stage": ("dual_rl", "with `--tie_margin`", "no program of dual_rl knows --tie_margin"),
    "key": ("dual_rl", "set `worker.rollout.m=4`", "worker.rollout.m=4: unknown key worker.rollout.m"),
    "key without a value": ("dual_rl", "see `worker.rolout.n`", "worker.rolout.n: no such setting"),
    "value of a key": ("dual_rl", "    bash examples/train.sh worker.rollout.n=many", "must be a valid integer"),
    "file of a key": ("dual_rl", "    worker.reward.reward_function=examples/x.py:f", "examples/x.py:f: no such file"),
    "key given to make": (".", "`make quickstart ARGS=trainer.steps=20`", "20: unknown key trainer.steps"),
    "script": ("cold_start", "    bash trian.sh", "bash trian.sh: no such script in cold_start"),
    "folder of a script": ("dual_rl", "    bash dual_rl/inference.sh", "no such script in dual_rl"),
    "module": ("cold_start", "    python -m infer_utils.check data.csv", "infer_utils.check: no such module"),
    "import": ("cold_start", "    python model/train_base.py", "train_base.py does not start: ModuleNotFoundError"),
    "program": ("cold_start", "    pyhton train_reward.py", "pyhton: not a program"),
    "variable": ("cold_start", "    DATE=a.csv bash train.sh", "DATE: cold_start/train.sh does not read this"),
    "variable before python": ("dual_rl", "`HEAD=x python serve.py --help`", "HEAD: nothing reads this variable"),
    "variable in the text": ("dual_rl", "with `SEEDS=1`", "SEEDS: no script of dual_rl reads this variable"),
    "variable in a table": ("cold_start", "| variable | |\n|-|-|\n| `DATA` | |\n| `DATUM` | |", "5: DATUM: no script"),
    "target": (".", "    make quickstrat", "make quickstrat: no such target"),
    "target elsewhere": ("dual_rl", "`make quickstart`", "make quickstart: no such target in dual_rl"),
    "variable of make": (".", "`make setup MACHIN=cpu`", "MACHIN: make does not read this variable"),
    "test": (".", "`python -m pytest dual_rl/tests -k no_such_test`", "-k no_such_test: no test in dual_rl/tests"),
    "file of a command": ("cold_start", "    bash train.sh --meta_data data/x.csv", "data/x.csv: no such file"),
    "file in the text": ("dual_rl", "see `verl/core/no_such.py`", "verl/core/no_such.py: no such file or folder"),
    "written file": ("dual_rl", "it writes `no_such.jsonl`", "no_such.jsonl: no such file or folder, and no program"),
    "link": ("dual_rl", "see [this](data/README.txt)", "link to data/README.txt: no such file"),
    "heading": (".", "see [this](dual_rl/README.md#no-such)", "link to dual_rl/README.md#no-such: no such heading"),
    "requirement file": ("dual_rl", "`pip install -r requirement.txt`", "requirement.txt: no such file in dual_rl"),
    "version": ("dual_rl", "`pip install vllm==0.1.0`", "vllm==0.1.0: the requirement files pin"),
    "environment": ("dual_rl", "`conda activate Descore_cs`", "env.yaml in dual_rl does not name it"),
    "syntax": ("dual_rl", "```python\nmodel = (\n```", "not valid Python"),
    "imported name": ("dual_rl", "```python\nfrom inference import Model\n```", "import Model: it has no Model"),
    "argument": ("dual_rl", f"{SNIPPET}RewardModel.from_pretrained('x', path='y')\n```", "unexpected keyword"),
    "method": ("dual_rl", f"{SNIPPET}m = RewardModel.from_pretrained('x')\nm.scores([])\n```", "has no scores"),
    "call in the text": ("dual_rl", f"{SNIPPET}```\n`RewardModel.load('x')`", "has no load"),
    "quotation": ("cold_start", '    bash train.sh "a', "No closing quotation"),
}  # fmt: skip
"""What is wrong: the README's folder, its text, and what has to be said about it."""

RIGHT = {
    "a section is one shell": (".", "    cd cold_start\n\nThen\n\n    bash train.sh --lora_r 8"),
    "a heading ends it": (".", "    cd cold_start\n\n# Next\n\n    cd dual_rl"),
    "a place is said": ("dual_rl", "From the\nrepository root:\n\n    bash dual_rl/inference.sh --backend hf"),
    "a place for all": ("dual_rl", "All commands are run in `cold_start/`.\n\n# Next\n\n    bash train.sh"),
    "a snippet says its place": (".", "```python\nimport inference  # from dual_rl/\n```"),
    "output is no command": (".", "    step 1 of 2\n    loss 0.5 (3 s)"),
    "the reader's own files": (
        "cold_start",
        "    DATA=my/a.csv bash train.sh --output_dir output/b",
    ),
    "an exported path": ("cold_start", "    export PYTHONPATH=.:datasets\n    python model/train_base.py --steps 1"),
}


def made_up(name: str, folder: str) -> str:
    return str(Path(folder) / f"{name}.md")


@pytest.fixture(scope="module")
def problems() -> dict[str, list[str]]:
    """What is wrong with each README, by its path."""
    readmes = find_readmes(ROOT)
    readmes |= {made_up(name, folder): f"\n{text}\n" for name, (folder, text, *_) in {**WRONG, **RIGHT}.items()}
    found: dict[str, list[str]] = {name: [] for name in readmes}
    for problem in find_problems(readmes, ROOT):
        found[problem.partition(":")[0]].append(problem)
    return found


def pieces_of(text: str, readme: str = "cold_start/README.md") -> list[Piece]:
    return read_pieces(readme, text, ROOT)


@pytest.mark.parametrize("readme", find_readmes(ROOT))
def test_a_newcomer_can_follow_the_readme(problems, readme):
    assert not problems[readme], "\n" + "\n".join(problems[readme])


def test_the_readmes_are_full_of_things_to_check():
    kinds = [piece.kind for name, text in find_readmes(ROOT).items() for piece in pieces_of(text, name)]
    numbers = {kind: kinds.count(kind) for kind in ("shell", "flags", "settings", "path", "link", "python", "call")}
    least = {"shell": 60, "flags": 60, "settings": 30, "path": 100, "link": 20, "python": 6, "call": 4}
    assert all(numbers[kind] >= least[kind] for kind in least), numbers


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_readme_is_found_out_and_the_place_named(problems, name):
    folder, text, words = WRONG[name]
    readme = made_up(name, folder)
    assert len(problems[readme]) == 1, problems[readme]
    assert words in problems[readme][0]
    assert int(problems[readme][0].split(":")[1]) in range(2, 2 + len(text.splitlines()))


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_readme_passes(problems, name):
    assert problems[made_up(name, RIGHT[name][0])] == []


def test_commands_are_read_as_a_shell_does():
    text = "A=1 B='x y' python -m x \\\n    --y 'a*'  # note\n\ncd a && ls > b.txt\n"
    first, second, third = parse_commands(text, line=5)
    assert (first.variables, first.program) == ({"A": "1", "B": "x y"}, "python")
    assert (first.arguments, first.line) == (("-m", "x", "--y", "a*"), 5)
    assert (second.program, second.arguments) == ("cd", ("a",))
    assert (third.program, third.arguments, third.line) == ("ls", (), 8)


def test_inline_code_over_two_lines_is_one_command():
    (piece,) = pieces_of("Here\n`python\ntrain_reward.py --help` tells.")
    assert (piece.line, piece.command.arguments) == (2, ("train_reward.py", "--help"))


def test_places_are_followed_through_a_readme():
    text = "# A\n\n    cd model\n    ls x\n\nand `make a`. From the repository root, `make b`.\n\n# B\n\n    make c\n"
    places = [(piece.command.arguments, piece.folder) for piece in pieces_of(text)]
    assert places == [
        (("model",), "cold_start"),
        (("x",), "cold_start/model"),
        (("a",), "cold_start/model"),
        (("b",), "."),
        (("c",), "cold_start"),
    ]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("make test", "shell"), ("X=1 bash a.sh", "shell"), ("X=1 Y=2", "variables"), ("--x 1", "flags"),
        ("a.py --x", "partial"), ("worker.rollout.n=4", "settings"), ("data.video_key", "settings"),
        ("data.py", "path"), ("verl/core/", "path"), ("m.score(a, b=1)", "call"), ("vllm==0.32.0", "pin"),
        ("MODEL_PATH", "name"), ("bt", "sample"), ("[2.0, 2.0]", "sample"), ("make", "sample"),
    ],
)  # fmt: skip
def test_inline_code_is_told_apart(text, kind):
    assert inline_kind(text) == kind


@pytest.mark.parametrize(
    ("language", "text", "kind"),
    [
        ("python", "x = 1", "python"), ("json", "{}", "sample"), ("", "bash a.sh", "shell"), ("sh", "A=1", "shell"),
        ("", "./a.sh now", "shell"), ("", "data.seed=1 data.shuffle=false", "settings"), ("", "loss 0.5", "sample"),
    ],
)  # fmt: skip
def test_blocks_are_told_apart(language, text, kind):
    assert block_kind(language, text) == kind
