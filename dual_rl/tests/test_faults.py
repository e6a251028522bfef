"""What goes wrong ends in exit status 1 and one clear message, without a hang; the last checkpoint stays whole."""

import re
import shutil

import pytest
import torch

from model_support import write_small_model
from toy_world.tables import read_table, write_table
from training_support import Run, free_port, largest_difference
from verl.trainer.checkpoints import CheckpointFolder, load_state, step_of
from verl.trainer.main import main

IN_A_STEP = {
    "kill_worker": r"rank 0 died in prepare\(\): its process was killed, or crashed",
    "raise": r"reward function .*spying_reward.py:compute_score raised KeyError: 'no such dimension'",
    "remove": r"pairs\.csv: \d of 6 pairs dropped(\n  row \d, video [AB]: video not found.*)+\nMore than data\.",
}


def assert_one_message(run: Run, pattern: str) -> None:
    """Exit status 1 and one message, in which `pattern` is; no traceback."""
    assert run.code == 1, run.output
    assert "Traceback" not in run.output, run.output
    assert len(re.findall(r"^error: ", run.output, re.MULTILINE)) == 1, run.output
    assert re.search(rf"^error: .*{pattern}", run.output, re.MULTILINE), run.output


@pytest.mark.parametrize(
    "fault", ["kill_worker", *(pytest.param(name, marks=pytest.mark.slow) for name in ("raise", "remove"))]
)
def test_a_fault_in_a_step_leaves_the_last_checkpoint_whole(fault, workplace):
    workplace.fault.write_text(f"{fault} 2")
    (workplace.root / "tmp").mkdir()
    run = workplace.run(settings={"trainer.max_steps": 5}, TMPDIR=str(workplace.root / "tmp"), RAY_TMPDIR="/tmp")
    assert_one_message(run, IN_A_STEP[fault])
    assert fault == "kill_worker" or not list((workplace.root / "tmp").glob("descore_engine_*"))
    assert not list(run.folder.glob("*.tmp"))
    assert run.checkpoints[0] == "global_step_1"
    # Videos of the next two steps were decoded before they were gone.
    assert (run.checkpoints == ["global_step_1"]) == (fault != "remove")
    last = CheckpointFolder(run.folder).find_last()
    assert load_state(last)
    assert step_of(last) == len(run.checkpoints)
    assert all(tensor.isfinite().all() for tensor in run.weights(step_of(last)).values())


@pytest.mark.slow
def test_a_video_that_breaks_after_the_check_costs_its_pair_only(workplace):
    """Validation before training is the moment at which it breaks; two ranks then share three pairs."""
    rows = read_table(workplace.root / "pairs.csv")
    shutil.copy(workplace.root / "videos" / "example_3_a.mp4", workplace.root / "videos" / "own.mp4")
    rows[3]["videos"] = str(["videos/own.mp4", "videos/example_3_b.mp4"])
    workplace.fault.write_text("remove:own.mp4 1")
    write_table(workplace.root / "val.csv", rows[:1])
    settings = {
        "data.val_files": workplace.root / "val.csv",
        "data.shuffle": False,
        "data.max_dropped_share": 0.25,
        "trainer.max_steps": 1,
        "trainer.n_cpu_ranks_per_node": 2,
    }
    runs = {}
    for name, size in (("four", 4), ("three", 3)):
        sizes = {"data.rollout_batch_size": size, "worker.actor.global_batch_size": size}
        write_table(workplace.root / f"{name}.csv", rows[:size])
        files = {"data.train_files": workplace.root / f"{name}.csv"}
        runs[name] = workplace.run(name, {**settings, **sizes, **files})
        assert runs[name].code == 0, runs[name].output
    assert runs["four"].output.count("four.csv: pair dropped: row 4, video A: video not found") == 1
    assert re.search(r"four\.csv: 1 of 4 pairs dropped\n  row 4, video A: video not found", runs["four"].output)
    assert "dropped" not in runs["three"].output
    assert runs["four"].repeatable_log == runs["three"].repeatable_log
    assert largest_difference(runs["four"].weights(1), runs["three"].weights(1)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "fault", "pattern"),
    [
        ({}, "kill_worker 1", r"rank [01] died in prepare\(\): its process was killed"),
        ({"worker.actor.optim.lr": 1e30}, "", r"rank [01]: step 1: loss .* stopped before the weights changed"),
    ],
    ids=["a rank dies", "the loss is not finite"],
)
def test_one_rank_in_trouble_ends_the_others(workplace, settings, fault, pattern):
    if fault:
        workplace.fault.write_text(fault)
    assert_one_message(workplace.run(settings={"trainer.n_cpu_ranks_per_node": 2, **settings}), pattern)


def test_what_cannot_run_is_named_before_a_worker_starts(workplace, tmp_path, capfd, monkeypatch):
    """In this process. A cluster that does not answer is an error, not a hang."""
    write_small_model(tmp_path / "base", has_reward=False)
    torch.save({"rm_head.weight": torch.zeros(1, 48)}, tmp_path / "rm_head.pth")
    cases = [
        ({"worker.actor.model.model_path": tmp_path / "base"}, "<Reward>.* stage 1 "),
        ({"worker.actor.model.head_path": tmp_path}, r"a head of shape \(1, 48\) .* hidden size"),
        ({"data.max_response_length": 8000}, r"together exceed the model's 8192 positions"),
        ({"trainer.nnodes": 2}, r"no Ray cluster to join, RAY_ADDRESS is not set: start it with"),
        ({}, r"no Ray cluster to join, nothing answers at RAY_ADDRESS=127.0.0.1:\d+: start it with"),
    ]
    for number, (settings, pattern) in enumerate(cases):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if not settings:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
        folder = workplace.root / f"run_{number}"
        code = main(workplace.arguments(folder, settings))
        assert_one_message(Run(code, capfd.readouterr().err, folder), pattern)
