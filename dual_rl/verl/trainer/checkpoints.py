"""Checkpoint folders of a run: complete or absent, the newest and the best kept, safe against a kill at any moment.

    EXP/global_step_4/             what the caller wrote, and state.json, which is written last
    EXP/global_step_6.tmp/         being written, or left by a killed run; the next run removes it
    EXP/checkpoint_tracker.json    {"last_global_step", "best_global_step", "best_val", "last_actor_path"}

A folder gets its name once everything in it is written, and older ones are removed only after that. The tracker is
for readers: it is derived from the folders, never the other way round. Only the driver calls what is here.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from descore.run_lock import lock_folder
from verl.config import TrainerConfig

TRACKER_FILE = "checkpoint_tracker.json"
STATE_FILE = "state.json"
ACTOR_FOLDER = "actor"
TEMPORARY_SUFFIX = ".tmp"
STEP_NAME = re.compile(r"global_step_(\d+)")

logger = logging.getLogger(__name__)


class CheckpointFolder:
    """The checkpoints under `root`, which is made if need be."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Hold the folder until this process ends. Raises ValueError that names the process that holds it."""
        lock_folder(self.root)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, in ascending order."""
        paths = [path for path in self.root.iterdir() if STEP_NAME.fullmatch(path.name)]
        return sorted(step_of(path) for path in paths if (path / STATE_FILE).is_file())

    def path_of(self, step: int) -> Path:
        return self.root / f"global_step_{step}"

    def find_last(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        steps = self.steps()
        return self.path_of(steps[-1]) if steps else None

    def clean(self) -> None:
        """Remove what killed runs left half written, and update the tracker. Call it with the lock held."""
        for path in self.root.glob(f"*{TEMPORARY_SUFFIX}"):
            logger.info("removing %s, which was never finished", path)
            _remove(path)
        if self.steps():
            self._write_tracker()

    @contextmanager
    def writing(
        self, step: int, *, state: Mapping[str, Any] | None, val: float | None = None, save_limit: int = -1
    ) -> Iterator[Path]:
        """Gives an empty folder to write the checkpoint of `step` into. When the block ends well, the folder becomes
        `global_step_N`, the tracker follows, and only the newest `save_limit` checkpoints (-1: all) and the best stay.

        `state`: what the trainer needs to resume, as JSON; None for a checkpoint that cannot be resumed from. `val`:
        validation score of these very weights, higher is better. All ranks must have closed their files when the
        block ends. If it raises, nothing remains of it and older checkpoints stay as they are.
        """
        final = self.path_of(step)
        assert step not in self.steps(), f"{final} is complete and would be written again"
        temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
        _remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            content = {"global_step": step, "val": val, "state": None if state is None else dict(state)}
            (temporary / STATE_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        except BaseException:
            _remove(temporary)
            raise
        _remove(final)  # if anything of that name is there, it is no complete checkpoint
        os.rename(temporary, final)
        best = self._write_tracker()
        for old in self.steps()[:-save_limit] if save_limit > 0 else ():
            if old != best:
                _remove(self.path_of(old))

    def _write_tracker(self) -> int | None:
        """Returns the step with the highest validation score, the later of equals; None without scores."""
        steps = self.steps()
        scores = [(_read_state(self.path_of(step))["val"], step) for step in steps]
        best_val, best = max((pair for pair in scores if pair[0] is not None), default=(None, None))
        tracker = {
            "last_global_step": steps[-1],
            "best_global_step": best,
            "best_val": best_val,
            "last_actor_path": str((self.path_of(steps[-1]) / ACTOR_FOLDER).absolute()),
        }
        write_atomically(self.root / TRACKER_FILE, json.dumps(tracker, indent=2) + "\n")
        return best


def step_of(checkpoint: Path) -> int:
    """The step N of a folder global_step_N. Raises ValueError for another name."""
    match = STEP_NAME.fullmatch(Path(checkpoint).name)
    if not match:
        raise ValueError(f"{checkpoint} is not a checkpoint folder. Its name must be global_step_N.")
    return int(match[1])


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was given to `CheckpointFolder.writing`. Raises ValueError if it was None."""
    state = _read_state(checkpoint)["state"]
    if state is None:
        raise ValueError(
            f"{checkpoint} was saved with trainer.save_model_only=true and cannot be resumed. Start a new "
            f"trainer.experiment_name with worker.actor.model.model_path={checkpoint}/{ACTOR_FOLDER}/huggingface."
        )
    return state


def find_resume(folder: CheckpointFolder, trainer: TrainerConfig) -> Path | None:
    """The checkpoint that the settings ask to resume from; None for a new run.

    Raises ValueError rather than mix two runs in one folder: when checkpoints are there already, only the last of
    them can be resumed from.
    """
    last, named = folder.find_last(), trainer.load_checkpoint_path
    if named is not None and not (Path(named) / STATE_FILE).is_file():
        raise ValueError(f"trainer.load_checkpoint_path={named} is not a complete checkpoint. It lacks {STATE_FILE}.")
    if last is not None and named is None and not trainer.find_last_checkpoint:
        raise ValueError(
            f"{folder.root} already holds {last.name}. Continue it with trainer.find_last_checkpoint=true, or "
            "choose another trainer.experiment_name."
        )
    if last is not None and named is not None and Path(named).resolve() != last.resolve():
        raise ValueError(
            f"{folder.root} already holds {last.name}, which trainer.load_checkpoint_path={named} would mix "
            "with another run. Choose another trainer.experiment_name, or leave trainer.load_checkpoint_path out."
        )
    return last if named is None else Path(named)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half written."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = Path(checkpoint) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _remove(path: Path) -> None:
    """Remove a file or folder. A folder loses its name first: a kill in between must not leave half a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(TEMPORARY_SUFFIX):
        doomed = path.with_name(f"{path.name}.old{TEMPORARY_SUFFIX}")
        _remove(doomed)
        path = path.rename(doomed)
    shutil.rmtree(path)
