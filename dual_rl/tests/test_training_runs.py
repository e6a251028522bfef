"""Stage 2 as users start it: whole runs with Ray, FSDP2 and a rollout engine on CPU ranks, and what stops them.

Weights are compared in fp32. On the same number of ranks a continued run must be bit-equal. On another number sums are
taken in another order; Adam divides by the root of the second moment and so turns the rounding of a gradient near zero
into a part of the learning rate, 1e-3 here: weights may differ by TOLERANCE, numbers in the log by RELATIVE_TOLERANCE.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import TemporaryDirectory

import pytest
import torch

from inference_support import Desk, all_pairs
from model_support import CLIPS, DUAL_RL, write_small_model
from stage1_support import write_pairs_csv
from test_reward_files import rewards_here, rewards_in_stage_1
from test_training import run as run_stage_1
from training_support import (
    RUN_TIMEOUT,
    Run,
    Running,
    Workplace,
    assert_one_message,
    free_port,
    largest_difference,
    wait_for,
    wait_until_gone,
)
from verl.model.reward_files import load_checkpoint
from verl.trainer.main import main

TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-4
TWO_RANKS = {"trainer.n_cpu_ranks_per_node": 2}


@pytest.fixture(scope="module")
def background_run(tmp_path_factory, small_model) -> tuple[Workplace, Running]:
    """`uninterrupted`, perhaps still going on."""
    workplace = Workplace.make(tmp_path_factory.mktemp("work") / "w", **{"worker.actor.model.model_path": small_model})
    return workplace, workplace.start()


@pytest.fixture(scope="module")
def uninterrupted(background_run) -> tuple[Workplace, Run]:
    """Three steps on one rank, without trouble: what interrupted, spread and continued runs must equal."""
    run = background_run[1].wait()
    assert run.code == 0, run.output
    return background_run[0], run


def assert_same_training(
    run: Run, workplace: Workplace, uninterrupted: tuple[Workplace, Run], *, num_steps: int = 3
) -> None:
    """The same responses to the same pairs in the same order, the same log, the same weights after each step."""
    reference_workplace, reference = uninterrupted
    assert workplace.calls[:num_steps] == reference_workplace.calls[:num_steps], run.output
    logs = ([line for line in of.repeatable_log if line["step"] <= num_steps] for of in (run, reference))
    for line, expected in zip(*logs, strict=True):
        assert line == pytest.approx(expected, rel=RELATIVE_TOLERANCE, abs=RELATIVE_TOLERANCE)
    for step in range(1, num_steps + 1):
        assert largest_difference(run.weights(step), reference.weights(step)) < TOLERANCE


def test_a_killed_run_continues_to_what_an_uninterrupted_one_reaches(background_run, workplace, capfd):
    """SIGKILL in the second step, before which no other run can join; test_checkpoints.py kills at every point."""
    running = workplace.start()
    wait_for(lambda: len(workplace.calls) == 2, running=running)
    running.signal(signal.SIGSTOP)
    assert main(workplace.arguments(running.folder, {})) == 1
    assert f"{running.folder} is in use by process {running.process.pid} on " in capfd.readouterr().err
    children = running.children()
    running.signal(signal.SIGKILL)
    run = running.wait()
    assert run.code == -signal.SIGKILL, run.output
    # Ray's own two agents look for their parent only now and then; they hold nothing that a run needs.
    held = {pid for pid, name in children.items() if name.startswith(("ray::Worker", "raylet", "gcs_server"))}
    assert len(held) == 3
    assert not wait_until_gone(held)
    assert run.checkpoints[0] == "global_step_1"
    assert "global_step_2" not in run.checkpoints

    run = workplace.run()
    assert run.code == 0, run.output
    assert run.checkpoints == ["global_step_1", "global_step_2", "global_step_3"]
    reference_workplace, reference = background_run[0], background_run[1].wait()
    assert largest_difference(run.weights(3), reference.weights(3)) == 0.0
    assert run.repeatable_log == reference.repeatable_log
    first, second, third = reference_workplace.calls
    assert workplace.calls == [first, second, second, third]

    assert main(workplace.arguments(run.folder, {"data.video_fps": 1.0, "trainer.max_steps": 4})) == 1
    assert "global_step_3 belongs to another run: other frames." in capfd.readouterr().err


def test_two_ranks_train_as_one_until_one_of_them_dies(uninterrupted, workplace):
    """In the second step, which leaves the first checkpoint whole; slow tests go through all three steps."""
    workplace.fault.write_text("2")
    run = workplace.run(settings=TWO_RANKS)
    assert_one_message(run.code, run.output, r"rank [01] died in prepare\(\): its process was killed, or crashed")
    assert [path.name for path in run.folder.glob("global_step_*")] == ["global_step_1"]
    assert_same_training(run, workplace, uninterrupted, num_steps=1)
    assert workplace.calls == uninterrupted[0].calls[:2]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_writes_everything_users_expect(workplace, num_ranks):
    """Two ranks write their rollouts together."""
    settings = {
        "trainer.n_cpu_ranks_per_node": num_ranks,
        "worker.rollout.tensor_parallel_size": num_ranks,
        "worker.rollout.name": "vllm",
        "data.val_files": workplace.root / "pairs.csv",
        "trainer.max_steps": 2,
        "trainer.val_freq": 1,
        "trainer.logger": "[console,file,tensorboard]",
        "worker.actor.model.lora.rank": 4,
        "worker.actor.offload.offload_params": True,
        "worker.actor.offload.offload_optimizer": True,
    }
    run = workplace.run(settings=settings)
    assert run.code == 0, run.output
    own = ("2 of 6 pairs do not fill", "loading the model", "  generate ...", "  ", "step ")
    foreign = [line for line in run.output.splitlines() if line.strip() and not line.startswith(own)]
    assert num_ranks > 1 or not foreign, run.output
    actor = run.folder / "global_step_2" / "actor"
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "reward_config.json"):
        assert (actor / "huggingface" / name).is_file(), name
    for name in ("actor/state/.metadata", "config.yaml", "state.json"):
        assert (run.folder / "global_step_2" / name).is_file(), name
    checkpoint = load_checkpoint(actor / "huggingface", actor, with_weights=True)
    rewards = rewards_here(checkpoint)
    torch.testing.assert_close(rewards, rewards_in_stage_1(actor / "huggingface", checkpoint), rtol=1e-5, atol=1e-5)
    tracker = json.loads((run.folder / "checkpoint_tracker.json").read_text())
    assert (tracker["last_global_step"], tracker["last_actor_path"]) == (2, str(actor))
    assert tracker["best_val"] == max(line["val/gsb_acc"] for line in run.log if line["step"] > 0)
    assert_complete_log(run)
    assert list((run.folder / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"has_experts": True}, {"tied": True}], ids=["experts", "tied"])
@pytest.mark.parametrize("settings", [{}, {"worker.actor.model.lora.rank": 4}], ids=["full", "lora"])
def test_a_model_goes_from_stage_1_to_scores(tmp_path, kind, settings):
    """Two steps of stage 1, merge, two steps of stage 2 with vLLM, and a benchmark, as users start them."""
    base = write_small_model(tmp_path / "base", has_reward=False, **kind)
    data, merged = write_pairs_csv(tmp_path / "cold.csv", CLIPS, labels=["A", "B", "A", "B"]), tmp_path / "merged"
    run_stage_1(data, base, tmp_path / "cold", max_steps=2, accumulation=2)
    merge = [sys.executable, "-m", "infer_utils.merge", tmp_path / "cold" / "checkpoint-2", merged, "--dtype=float32"]
    subprocess.run(merge, cwd=DUAL_RL.parent / "cold_start", check=True)
    workplace = Workplace.make(tmp_path / "work", **{"worker.actor.model.model_path": merged})
    run = workplace.run(settings={**settings, "worker.rollout.name": "vllm", "trainer.max_steps": 2})
    assert run.code == 0, run.output
    assert run.log[-1]["rollout/log_prob_difference_max"] < 1e-4
    desk = Desk(tmp_path, run.folder / "global_step_2")
    scored = {
        backend: desk.run(desk.write(all_pairs()), f"{backend}/scores.csv", backend=backend)
        for backend in ("hf", "vllm")
    }
    rewards, cots = ([each.of_items(name) for each in scored.values()] for name in ("reward", "cot"))
    assert cots[0] == cots[1]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    assert len(set(rewards[0].values())) > 5


def assert_complete_log(run: Run) -> None:
    """Training numbers of both steps, validation before and after, and sample generations of every validation."""
    assert [line["step"] for line in run.log] == [0, 1, 2]
    last = run.log[-1]
    expected = {
        "reward/overall/mean", "response_length/clip_ratio", "group/zero_variance", "perf/packed_tokens",
        "actor/kl", "actor/entropy", "actor/grad_norm", "bt/loss", "bt/accuracy", "timing/share/generate",
    }  # fmt: skip
    assert expected <= last.keys()
    assert last["rollout/log_prob_difference_max"] < 1e-4
    assert last["rollout/log_prob_beyond_bound"] == 0.0
    samples = [json.loads(line) for line in (run.folder / "generations.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    assert all(isinstance(sample["head_reward"], float) for sample in samples)


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
        code = main(workplace.arguments(workplace.root / f"run_{number}", settings))
        assert_one_message(code, capfd.readouterr().err, pattern)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_every_rank(workplace):
    run = workplace.run(settings={**TWO_RANKS, "worker.actor.optim.lr": 1e30})
    assert_one_message(run.code, run.output, r"rank [01]: step 1: loss .* stopped before the weights changed")


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks(uninterrupted, workplace):
    """2 ranks, then 1, then 2."""
    for ranks, last in ((2, 1), (1, 2), (2, 3)):
        run = workplace.run(settings={"trainer.n_cpu_ranks_per_node": ranks, "trainer.max_steps": last})
        assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["worker.actor.model.lora.rank=4", "worker.actor.model.freeze_vision_tower=false"])
def test_lora_and_a_tuned_tower_continue_bit_equal(workplace, setting):
    key, _, value = setting.partition("=")
    for name, last in (("whole", 2), ("parts", 1), ("parts", 2)):
        run = workplace.run(name, {key: value, "trainer.max_steps": last})
        assert run.code == 0, run.output
    whole = Run(0, "", workplace.root / "whole")
    assert largest_difference(run.weights(2), whole.weights(2)) == 0.0


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """A Ray cluster of two raylets with one CPU each on this machine; gives what a run needs to join it."""
    ray, port = os.path.join(os.path.dirname(sys.executable), "ray"), free_port()
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="ds"))  # sockets in it allow no long path
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
        for options in (head, [f"--address=127.0.0.1:{port}"]):
            command = [ray, "start", *options, "--num-cpus=1", "--block"]
            node = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
            stack.callback(node.wait, 30)
            stack.callback(node.terminate)
            while "Ray runtime started" not in node.stdout.readline():
                assert node.poll() is None, "the node ended"
        yield {**variables, "RAY_ADDRESS": f"127.0.0.1:{port}"}


def run_command(workplace: Workplace, name: str, settings: dict[str, object], variables: dict[str, str]) -> Run:
    """A run just as users start it, with stdout and stderr together; Ray reads variables on import."""
    command = [sys.executable, "-m", "verl.trainer.main", *workplace.arguments(workplace.root / name, settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": RUN_TIMEOUT}
    result = subprocess.run(command, cwd=DUAL_RL, env=environment, check=False, **pipes)
    return Run(result.returncode, result.stdout, workplace.root / name)


@pytest.mark.slow
def test_two_ray_nodes_train_as_one(two_nodes, uninterrupted, workplace):
    run = run_command(workplace, "run", {"trainer.nnodes": 2}, two_nodes)
    assert run.code == 0, run.output
    assert_same_training(run, workplace, uninterrupted)
    settings = {"trainer.nnodes": 3, "worker.actor.global_batch_size": 4}
    run = run_command(workplace, "more", settings, two_nodes)
    assert run.code == 1
    assert "asks for 3 node(s) with 1 CPU(s) each, but the Ray cluster has 2 node(s)" in run.output
