"""The set-up's own promises: pins that agree, errors that help, and a torchvision hook that stays out of the way."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision import extension

ROOT = Path(__file__).resolve().parent.parent


def read_pins(path: Path) -> dict[str, str]:
    """Package name to version, of the lines `name==version` of a requirement file."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("-"))


def load_hook() -> ModuleType:
    """A fresh copy of the hook module: the installed one has already run in this process."""
    spec = importlib.util.spec_from_file_location("fresh_torchvision_cpu_ops", ROOT / ".ci" / "torchvision_cpu_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirement_files_pin_shared_packages_alike():
    version_of: dict[str, str] = {}
    files = sorted(ROOT.glob("*/requirements*.txt"))
    assert len(files) >= 4
    for path in files:
        for name, version in read_pins(path).items():
            assert version_of.setdefault(name, version) == version, f"{path}: {name} is pinned differently elsewhere"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [({"STAGES": "no_such_stage"}, "STAGES names 'no_such_stage'"), ({"MACHINE": "toaster"}, "must be cpu or gpu")],
)
def test_setup_explains_a_wrong_setting(tmp_path, variables, complaint):
    result = subprocess.run(
        ["bash", ROOT / ".ci" / "setup_env.sh"],
        env=os.environ | {"VENV": str(tmp_path / "venv")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert complaint in result.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_a_folder_alone_that_is_no_environment(tmp_path):
    keepsake = tmp_path / "keepsake.txt"
    keepsake.write_text("mine")
    result = subprocess.run(
        ["bash", ROOT / ".ci" / "setup_env.sh"],
        env=os.environ | {"VENV": str(tmp_path), "MACHINE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "is not a virtual environment" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["keepsake.txt"]


def test_hook_costs_no_import_at_python_start():
    code = "import sys; print('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_hook_changes_nothing_where_the_operators_are_there(monkeypatch):
    hook = load_hook()
    monkeypatch.setattr(extension, "_has_ops", lambda: True)
    hook.declare_missing_operators()
    assert hook._libraries == []


@pytest.mark.skipif(extension._has_ops(), reason="torchvision's own operators are there")
def test_torchvision_imports_and_says_itself_that_an_operator_is_missing():
    from torchvision.ops import nms
    from torchvision.transforms.v2.functional import resize

    assert resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
    with pytest.raises(RuntimeError, match="Couldn't load custom C\\+\\+ ops"):
        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_hugging_face_datasets_is_not_shadowed():
    code = "import datasets; print(hasattr(datasets, 'Dataset'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "cold_start", capture_output=True, text=True)
    assert result.stdout == "True\n"
