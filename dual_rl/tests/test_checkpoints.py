"""Checkpoint folders: complete or absent, whatever happens; the newest and the best stay."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl.config import TrainerConfig
from verl.trainer.checkpoints import TRACKER_FILE, CheckpointFolder, find_resume, load_state, step_of

FILES = {"actor/huggingface/model.safetensors": 3000, "actor/rm_head.pth": 100, "config.yaml": 10}
DUAL_RL = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{DUAL_RL}:{DUAL_RL / 'tests'}"}


def save(folder: CheckpointFolder, step: int, **settings) -> None:
    with folder.writing(step, **{"state": {"step": step}, **settings}) as path:
        for name, size in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(bytes([step]) * size)


def assert_whole(path: Path) -> None:
    step = step_of(path)
    assert load_state(path) == {"step": step}
    assert {name: (path / name).read_bytes() for name in FILES} == {n: bytes([step]) * s for n, s in FILES.items()}


def tracker_of(folder: CheckpointFolder) -> dict:
    return json.loads((folder.root / TRACKER_FILE).read_text())


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "results" / "exp")


def test_tracker_names_last_and_best(folder):
    assert folder.find_last() is None
    for step, val, best in ((1, None, None), (2, 0.7, 2), (3, 0.7, 3), (10, 0.5, 3)):
        save(folder, step, val=val)
        assert tracker_of(folder) == {
            "last_global_step": step,
            "best_global_step": best,
            "best_val": 0.7 if best else None,
            "last_actor_path": str(folder.root / f"global_step_{step}" / "actor"),
        }
    assert_whole(folder.find_last())


@pytest.mark.parametrize(("limit", "kept"), [(-1, [1, 2, 3, 4, 5]), (1, [2, 5]), (2, [2, 4, 5])])
def test_the_newest_and_the_best_are_kept(folder, limit, kept):
    for step, val in enumerate((0.1, 0.9, 0.3, 0.2, 0.1), start=1):
        save(folder, step, val=val, save_limit=limit if step == 5 else -1)
    assert folder.steps() == kept


def test_a_failed_save_leaves_nothing_and_removes_nothing(folder):
    save(folder, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(folder, 2, val=float("nan"), save_limit=1)
    assert tracker_of(folder)["last_global_step"] == 1
    assert sorted(path.name for path in folder.root.iterdir()) == [TRACKER_FILE, "global_step_1"]


KILLED_AT_EVERY_POINT = """
import os, shutil, signal, sys
from pathlib import Path
from test_checkpoints import CheckpointFolder, save

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
root = Path(sys.argv[1])
save(CheckpointFolder(root / "start"), 1, val=0.9)
save(CheckpointFolder(root / "start"), 2, val=0.1)

point = 0
while True:
    shutil.copytree(root / "start", root / str(point))
    child = os.fork()
    if child == 0:
        folder, remaining = CheckpointFolder(root / str(point)), [point]
        def die_at_the_point(event, arguments):
            if event in EVENTS:
                if remaining[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining[0] -= 1
        sys.addaudithook(die_at_the_point)
        save(folder, 3, val=0.5, save_limit=1)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    point += 1
"""


def test_a_kill_at_any_point_of_writing_leaves_whole_checkpoints(tmp_path):
    """A real process is killed with SIGKILL before its 1st, 2nd, 3rd, ... operation on files."""
    subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_POINT, str(tmp_path)], env=ENVIRONMENT, check=True)
    shutil.rmtree(tmp_path / "start")
    roots = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(roots) > 20
    outcomes = []
    for root in roots:
        folder = CheckpointFolder(root)
        before = folder.steps()
        assert 1 in before, "the best is never removed"
        assert before[-1] == 3 or before == [1, 2], "older ones go only after the new one stands"
        assert tracker_of(folder)["last_global_step"] in (2, 3)
        folder.clean()
        assert folder.steps() == before
        for step in before:
            assert_whole(folder.path_of(step))
        assert {path.name for path in root.iterdir()} == {TRACKER_FILE, *(f"global_step_{step}" for step in before)}
        tracker = tracker_of(folder)
        assert (tracker["last_global_step"], tracker["best_global_step"]) == (before[-1], 1)
        outcomes.append(before)
    assert outcomes[0] == [1, 2]
    assert outcomes[-1] == [1, 3], "the last root is of the process that was not killed"
    assert [1, 2, 3] in outcomes, "some were killed between the new one's arrival and the old one's end"


def test_resume_point_follows_the_settings(folder, tmp_path):
    assert find_resume(folder, TrainerConfig()) is None
    save(folder, 1)
    save(folder, 2)
    assert find_resume(folder, TrainerConfig()) == folder.path_of(2)
    with pytest.raises(ValueError, match=r"already holds global_step_2\. Continue it"):
        find_resume(folder, TrainerConfig(find_last_checkpoint=False))
    with pytest.raises(ValueError, match=r"already holds global_step_2, which .*global_step_1 would mix"):
        find_resume(folder, TrainerConfig(load_checkpoint_path=str(folder.path_of(1))))
    other = CheckpointFolder(tmp_path / "other")
    assert find_resume(other, TrainerConfig(load_checkpoint_path=str(folder.path_of(1)))) == folder.path_of(1)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        find_resume(other, TrainerConfig(load_checkpoint_path=str(tmp_path)))


def test_a_model_only_checkpoint_says_that_it_cannot_be_resumed(folder):
    save(folder, 1, state=None)
    with pytest.raises(ValueError, match=r"save_model_only.*model_path=.*global_step_1/actor/huggingface"):
        load_state(folder.find_last())
