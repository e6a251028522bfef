"""Stage 2 as users start it: whole runs with Ray, FSDP2 and a rollout engine on CPU ranks.

Weights are compared in fp32. On the same number of ranks a continued run must be bit-equal. On another number sums are
taken in another order; Adam divides by the root of the second moment and so turns the rounding of a gradient near zero
into a part of the learning rate, 1e-3 here: weights may differ by TOLERANCE, numbers in the log by RELATIVE_TOLERANCE.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from test_reward_files import rewards_here, rewards_in_stage_1
from training_support import Run, Workplace, free_port, largest_difference, run_command, wait_for_line, wait_until_gone
from verl.model.reward_files import load_checkpoint

TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-4
HAS_VLLM = importlib.util.find_spec("vllm") is not None
TWO_RANKS = {"trainer.n_cpu_ranks_per_node": 2}


def assert_same_training(run: Run, workplace: Workplace, uninterrupted: tuple[Workplace, Run]) -> None:
    """The same responses to the same pairs in the same order, the same log, the same weights after three steps."""
    reference_place, reference = uninterrupted
    assert workplace.calls == reference_place.calls
    for line, expected in zip(run.repeatable_log, reference.repeatable_log, strict=True):
        assert line == pytest.approx(expected, rel=RELATIVE_TOLERANCE, abs=RELATIVE_TOLERANCE)
    for step in (1, 2, 3):
        assert largest_difference(run.weights(step), reference.weights(step)) < TOLERANCE


def test_a_killed_run_continues_to_what_an_uninterrupted_one_reaches(background_run, workplace):
    workplace.fault.write_text("kill_run 2")
    run = workplace.run()
    assert run.code == -signal.SIGKILL, run.output
    workplace.fault.unlink()
    # Ray's own two agents look for their parent only now and then; they hold nothing that a run needs.
    held = {
        pid for pid, name in workplace.children.items() if name.startswith(("ray::Worker", "raylet", "gcs_server"))
    }
    assert len(held) == 3
    assert not wait_until_gone(held)
    assert run.checkpoints == ["global_step_1"]

    running = workplace.start()
    running.kill_when(run.folder / "global_step_2.tmp")
    assert running.wait().code == -signal.SIGKILL
    assert run.checkpoints == ["global_step_1", "global_step_2.tmp"]

    run = workplace.run()
    assert run.code == 0, run.output
    assert run.checkpoints == ["global_step_1", "global_step_2", "global_step_3"]
    reference_place, reference = background_run[0], background_run[1].wait()
    assert reference.code == 0, reference.output
    assert largest_difference(run.weights(3), reference.weights(3)) == 0.0
    assert run.repeatable_log == reference.repeatable_log
    assert [workplace.calls[index] for index in (0, 1, -1)] == reference_place.calls
    assert workplace.calls[1] == workplace.calls[2] == workplace.calls[3]

    refused = workplace.run(settings={"data.video_fps": 1.0, "trainer.max_steps": 4})
    assert refused.code == 1
    assert "global_step_3 belongs to another run: other frames." in refused.output


def test_two_ranks_train_as_one(uninterrupted, workplace):
    run = workplace.run(settings=TWO_RANKS)
    assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_a_run_writes_everything_users_expect(workplace):
    settings = {
        "worker.rollout.name": "vllm",
        "data.val_files": workplace.root / "pairs.csv",
        "trainer.max_steps": 2,
        "trainer.val_freq": 1,
        "trainer.logger": "[console,file,tensorboard]",
        "worker.actor.model.lora.rank": 4,
        "worker.actor.offload.offload_params": True,
        "worker.actor.offload.offload_optimizer": True,
    }
    folder = workplace.root / "run"
    run = run_command(folder, workplace.arguments(folder, settings))
    assert run.code == 0, run.output
    assert_tidy_console(run.output)
    actor = folder / "global_step_2" / "actor"
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "reward_config.json"):
        assert (actor / "huggingface" / name).is_file(), name
    for name in ("actor/state/.metadata", "config.yaml", "state.json"):
        assert (folder / "global_step_2" / name).is_file(), name
    checkpoint = load_checkpoint(actor / "huggingface", actor, with_weights=True)
    torch.testing.assert_close(
        rewards_here(checkpoint), rewards_in_stage_1(actor / "huggingface", checkpoint), rtol=1e-5, atol=1e-5
    )
    tracker = json.loads((folder / "checkpoint_tracker.json").read_text())
    assert tracker["last_global_step"] == 2
    assert tracker["last_actor_path"] == str(actor)
    assert tracker["best_val"] == max(line["val/gsb_acc"] for line in run.log if line["step"] > 0)
    assert_complete_log(run)
    assert list((folder / "tensorboard").iterdir())


def assert_complete_log(run: Run) -> None:
    """Training numbers of both steps, validation before and after, and sample generations of every validation."""
    assert [line["step"] for line in run.log] == [0, 1, 2]
    last = run.log[-1]
    for name in (
        "reward/overall/mean",
        "response_length/clip_ratio",
        "group/zero_variance",
        "perf/packing_efficiency",
    ):
        assert name in last, name
    for name in ("actor/kl", "actor/entropy", "actor/grad_norm", "bt/loss", "bt/accuracy", "timing/share/generate"):
        assert name in last, name
    assert last["rollout/log_prob_difference_max"] < 1e-4
    assert last["rollout/log_prob_beyond_bound"] == 0.0
    samples = [json.loads(line) for line in (run.folder / "generations.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    assert all(isinstance(sample["head_reward"], float) for sample in samples)


def assert_tidy_console(output: str) -> None:
    """Nothing but the run's own lines: no library has anything to tell its users' users."""
    own = ("2 of 6 pairs do not fill", "generations of step", "  ", "step ")
    foreign = [line for line in output.splitlines() if line.strip() and not line.startswith(own)]
    assert not foreign, output


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks(uninterrupted, workplace):
    """2 ranks, then 1, then 2."""
    for ranks, last in ((2, 1), (1, 2), (2, 3)):
        run = workplace.run(settings={"trainer.n_cpu_ranks_per_node": ranks, "trainer.max_steps": last})
        assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"worker.actor.fsdp.fsdp_size": 1, "worker.ref.fsdp.fsdp_size": 1},
        {"worker.actor.fsdp.enable_cpu_offload": True, "worker.ref.fsdp.enable_cpu_offload": True},
        {"worker.actor.offload.offload_params": True, "worker.ref.offload.offload_params": True},
    ],
    ids=["hybrid sharding", "CPU offload", "weights given up"],
)
def test_other_ways_of_sharding_train_the_same(uninterrupted, workplace, settings):
    run = workplace.run(settings={**TWO_RANKS, **settings})
    assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)


@pytest.mark.slow
def test_lora_and_a_tuned_tower_continue_bit_equal(workplace):
    for name, settings in (
        ("lora", {"worker.actor.model.lora.rank": 4}),
        ("tower", {"worker.actor.model.freeze_vision_tower": False}),
    ):
        whole = workplace.run(f"{name}-whole", {**settings, "trainer.max_steps": 2})
        assert whole.code == 0, whole.output
        for last in (1, 2):
            parts = workplace.run(f"{name}-parts", {**settings, "trainer.max_steps": last})
            assert parts.code == 0, parts.output
        assert largest_difference(parts.weights(2), whole.weights(2)) == 0.0


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """A Ray cluster of two raylets with one CPU each on this machine; gives what a run needs to join it."""
    folder = Path(tempfile.mkdtemp(prefix="ds"))  # sockets in it allow no long path
    ray, port = str(Path(sys.executable).with_name("ray")), free_port()
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes = []
    try:
        for number, place in enumerate((head, [f"--address=127.0.0.1:{port}"])):
            log = folder / f"node-{number}.log"
            with log.open("w") as file:
                command = [ray, "start", *place, "--num-cpus=1", "--block"]
                node = subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)
            nodes.append(node)
            wait_for_line(log, "Ray runtime started", process=node)
        yield {**variables, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_ray_nodes_train_as_one(two_nodes, uninterrupted, workplace):
    folder = workplace.root / "run"  # Ray reads its variables when it is imported: no fork
    run = run_command(folder, workplace.arguments(folder, {"trainer.nnodes": 2}), **two_nodes)
    assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)

    settings = {"trainer.nnodes": 3, "worker.actor.global_batch_size": 4}
    run = run_command(folder, workplace.arguments(workplace.root / "more", settings), **two_nodes)
    assert run.code == 1
    assert "asks for 3 node(s) with 1 CPU(s) each, but the Ray cluster has 2 node(s)" in run.output
