"""Stage 2 as users start it: whole runs with Ray, FSDP2 and a rollout engine on CPU ranks."""

import json
import shutil

import pytest
import torch

import checkpoint as stage1
from training_support import DUAL_RL, largest_difference, run_command, wait_until_gone


def test_a_killed_run_continues_to_what_an_uninterrupted_one_reaches(uninterrupted, workplace):
    workplace.fault.write_text("kill_run 2")
    run = workplace.run()
    assert run.code == -9, run.output
    workplace.fault.unlink()
    # Ray's own two agents look for their parent only now and then; they hold nothing that a run needs.
    held = {pid for pid, name in workplace.children.items() if name.startswith(("ray::Worker", "raylet", "gcs_server"))}
    assert len(held) == 3
    assert not wait_until_gone(held)
    folder = run.folder
    assert sorted(path.name for path in folder.glob("global_step_*")) == ["global_step_1"]

    running = workplace.start()
    running.kill_when(folder / "global_step_2.tmp")
    assert running.wait().code == -9
    assert sorted(path.name for path in folder.glob("global_step_*")) == ["global_step_1", "global_step_2.tmp"]

    run = workplace.run()
    assert run.code == 0, run.output
    assert not list(folder.glob("*.tmp"))
    reference_place, reference = uninterrupted[0], uninterrupted[1].wait()
    assert reference.code == 0, reference.output
    assert largest_difference(run.weights(3), reference.weights(3)) == 0.0
    assert run.repeatable_log == reference.repeatable_log
    assert [workplace.calls[index] for index in (0, -2, -1)] == reference_place.calls


def test_two_ranks_train_as_one(uninterrupted, workplace):
    reference_place, reference = uninterrupted
    run = workplace.run(settings={"trainer.n_cpu_ranks_per_node": 2})
    assert run.code == 0, run.output
    assert workplace.calls == reference_place.calls
    for step in (1, 2, 3):
        print(step, largest_difference(run.weights(step), reference.weights(step)))
    for a, b in zip(run.repeatable_log, reference.repeatable_log, strict=True):
        print({k: (a[k], b[k]) for k in a if abs(a[k] - b[k]) > 1e-5 * max(abs(b[k]),1)})
    assert 0
