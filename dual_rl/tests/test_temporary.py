"""Temporary folders: gone with their process, however it ends, and never while it lives."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_support import DUAL_RL
from verl.temporary import temporary_folder


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The temporary directory of this process and of those that it starts; sockets in it allow no long path."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


def start(code: str, temporary: Path) -> subprocess.Popen:
    """A process that has printed a line."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(DUAL_RL)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


HOLD = """
import time
from verl.temporary import temporary_folder
with temporary_folder("engine") as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_process_goes_with_the_next_start(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    users = temporary / "descore_update_8b"
    users.mkdir()
    (temporary / "descore_link").symlink_to(users)
    killed, living = start(HOLD, temporary), start(HOLD, temporary)
    kill(killed)
    assert len(list(temporary.glob("descore_engine_*/weights"))) == 2
    with temporary_folder("engine") as own, temporary_folder("server"):
        assert len(list(temporary.glob("descore_engine_*/weights"))) == 1
        assert own in temporary.glob("descore_engine_*")
    assert not own.exists()
    kill(living)
    with temporary_folder("engine"):
        assert not list(temporary.glob("descore_engine_*/weights"))
    assert sorted(path.name for path in temporary.iterdir()) == ["descore_link", "descore_update_8b"]
