"""Temporary folders: gone with their process, however it ends, and never while it lives."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from model_support import DUAL_RL
from verl.temporary import temporary_folder

HOLD = """
import time
from verl.temporary import temporary_folder
with temporary_folder("engine") as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(flush=True)
    time.sleep(60)
"""


def hold(temporary: Path) -> subprocess.Popen:
    """A process that has a folder there."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(DUAL_RL)}
    process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_the_folder_of_a_killed_process_goes_with_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    users = tmp_path / "descore_update_8b"
    users.mkdir()
    (tmp_path / "descore_link").symlink_to(users)
    killed, living = hold(tmp_path), hold(tmp_path)
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.glob("descore_engine_*/weights"))) == 2
    with temporary_folder("engine") as own, temporary_folder("server"):
        assert len(list(tmp_path.glob("descore_engine_*/weights"))) == 1
        assert own in tmp_path.glob("descore_engine_*")
    assert not own.exists()
    living.kill()
    living.communicate()
    with temporary_folder("engine"):
        assert not list(tmp_path.glob("descore_engine_*/weights"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["descore_link", "descore_update_8b"]
