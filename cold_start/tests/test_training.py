"""Training as users launch it: `train.sh`, DeepSpeed, real processes. Runs are shared between tests."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_reward
from checkpoint import load_reward_model
from infer_utils import RewardScorer
from stage1_support import REAL_VIDEOS, SMALL_BUDGET, STAGE_DIR, write_pairs_csv

SETTINGS = {
    "max_steps": 3,
    "logging_epochs": 0.001,
    "eval_epochs": 100,
    "save_epochs": 100,
    "learning_rate": 1e-3,
    "merger_lr": 1e-3,
    "vision_lr": 1e-3,
    "special_token_lr": 1e-3,
    "lora_r": 4,
    "lora_alpha": 8,
    "dataloader_num_workers": 0,
    "report_to": "none",
}
RUN_SECONDS = 240
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # 1% of a step: Adam makes steps of gradients that are only rounding


def start(
    data: Path, base: Path, output: Path, *, processes=1, zero=None, accumulation=4, batch=1, node=None, **settings
):
    """Launch train.sh; returns the process, whose output is captured. `node`: variables of one of several nodes.

    `zero`: ZeRO stage, by default the one that train.sh takes.
    """
    if zero is not None:
        settings["deepspeed"] = STAGE_DIR / f"ds_config/zero{zero}.json"
    settings |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    environment = os.environ | {
        "DATA": str(data),
        "MODEL_PATH": str(base),
        "OUTPUT_DIR": str(output),
        "NUM_GPUS": "0",
        "NUM_PROCESSES": str(processes),
        "OMP_NUM_THREADS": "1",
        **(node or {}),
    }
    command = ["bash", str(STAGE_DIR / "train.sh"), *flags(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def flags(settings: dict[str, object]) -> list[str]:
    return [text for name, value in (SETTINGS | settings).items() for text in (f"--{name}", str(value))]


def run(*arguments, **settings) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    process = start(*arguments, **settings)
    output, _ = process.communicate(timeout=RUN_SECONDS)
    return process.returncode, output


@pytest.fixture(scope="module")
def refusal():
    """What train_reward.py says of work that it refuses; each time in a process of its own that has its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "peft", "pytest", "torchvision", "transformers", "pandas"])

    def call(data: Path, base: Path, output: Path, *, zero=0, **settings) -> str:
        config = STAGE_DIR / f"ds_config/zero{zero}.json"
        paths = {"meta_data": data, "model_name_or_path": base, "output_dir": output, "deepspeed": config}
        log = output.with_name("refusal.log")
        process = context.Process(target=train_alone, args=(flags(paths | {"eval_dim": "GSB"} | settings), log))
        process.start()
        process.join(RUN_SECONDS)
        process.kill()  # only one that hangs is still there
        text = log.read_text()
        assert (process.exitcode, "Traceback" in text) == (2, False), text
        return text

    return call


def train_alone(arguments: list[str], log: Path) -> None:
    """train_reward.py as the only process of a run, its output in `log`."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in names.items()})
    sys.argv = ["train_reward.py", *arguments]
    sys.stdout = sys.stderr = log.open("w")
    train_reward.main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def evaluations(output: Path) -> list[dict]:
    lines = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [line for line in lines if "eval/loss" in line]


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    head = torch.load(checkpoint / "rm_head.pth", weights_only=True)
    return (
        load_file(checkpoint / "adapter_model.safetensors")
        | load_file(checkpoint / "tuned_weights.safetensors")
        | head
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clips, small_base):
    """Runs training with the given settings once per module; returns its output folder."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_pairs_csv(
        folder / "pairs.csv", clips, labels=["A", "B", "same", "A", "invalid", "B", "B", "A", "A", "B"]
    )

    @cache
    def run_once(**settings) -> Path:
        output = folder / "-".join(["run", *(f"{key}{value}" for key, value in settings.items())]).replace("/", "_")
        status, text = run(data, small_base, output, meta_data_test=data, per_device_eval_batch_size=3, **settings)
        assert status == 0, text
        return output

    return run_once


def assert_same_training(first: Path, second: Path) -> None:
    assert losses(first) == pytest.approx(losses(second), abs=LOSS_TOLERANCE)
    assert len(evaluations(first)) == 1
    assert evaluations(first)[0] == pytest.approx(evaluations(second)[0], abs=1e-4)
    expected, found = (trained_weights(output / "checkpoint-3") for output in (first, second))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **WEIGHT_TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


def test_losses_fall_and_the_checkpoint_scores(finished, clips):
    output = finished()
    assert len(losses(output)) == 3
    scorer = RewardScorer.from_pretrained(output / "checkpoint-3")
    assert scorer.config.video == SMALL_BUDGET
    rewards = scorer.score([str(clips[0]), str(clips[1])], prompts=["a red circle"] * 2)
    assert all(torch.isfinite(torch.tensor(rewards)))
    assert rewards[0] != rewards[1]


@pytest.mark.parametrize(("zero", "stage"), [(None, 2), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(finished, zero, stage):
    sharded = finished(processes=2, accumulation=2, zero=zero)
    assert_same_training(finished(), sharded)
    stages = [
        json.loads((run / "checkpoint-3/trainer_state.json").read_text())["zero_stage"]
        for run in (finished(), sharded)
    ]
    assert stages == [0, stage]


@pytest.mark.slow
def test_two_nodes_train_as_one_process(finished, clips, small_base, tmp_path):
    """Two nodes with a process each, here on one machine under two names."""
    data = finished().parent / "pairs.csv"
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    variables = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"meta_data_test": data, "per_device_eval_batch_size": 3, "accumulation": 2}
    nodes = [
        start(data, small_base, tmp_path / "run", node={**variables, "NODE_RANK": str(rank)}, **settings)
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=RUN_SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_training(finished(), tmp_path / "run")


def test_a_node_without_its_rank_is_told_what_is_missing(tmp_path, clips, small_base):
    status, text = run(tmp_path / "a.csv", small_base, tmp_path / "run", node={"HOSTFILE": "hosts"})
    assert status != 0
    assert "HOSTFILE needs NODE_RANK" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 4, "accumulation": 1},
        pytest.param({"zero": 2}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": False}, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_zero_stage_and_recomputation_change_nothing(finished, settings):
    assert_same_training(finished(), finished(**settings))


def test_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, clips, small_base):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same", "A", "B", "A"])
    settings = {"max_steps": 6, "save_epochs": 0.001, "accumulation": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, text = run(data, small_base, whole, **settings)
    assert status == 0, text
    process = start(data, small_base, killed, **settings)
    wait_for(killed / "checkpoint-2", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "checkpoint-6").exists()
    (killed / "tmp-checkpoint-9").mkdir()  # what a kill in the middle of writing leaves
    with (killed / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    status, text = run(data, small_base, killed, **settings, resume_from_checkpoint="latest")
    assert status == 0, text
    assert not list(killed.glob("tmp-*"))
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-9)
    expected, found = (trained_weights(output / "checkpoint-6") for output in (whole, killed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8)


def test_used_output_folder_and_other_settings_are_refused(finished, clips, small_base, tmp_path, refusal):
    output = tmp_path / "output"
    shutil.copytree(finished(), output)
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"])
    text = refusal(data, small_base, output)
    assert "already holds checkpoint-3: continue it with --resume_from_checkpoint latest" in text
    text = refusal(data, small_base, output, gradient_accumulation_steps=4, resume_from_checkpoint="latest")
    assert "cannot resume from" in text
    assert "num_pairs was 10, now it is 2" in text


def test_another_model_is_refused(finished, small_base, tmp_path, refusal):
    """Frozen weights are in no checkpoint: a run that went on from another base would mix the two."""
    output, other = tmp_path / "output", tmp_path / "other"
    shutil.copytree(finished(), output)
    shutil.copytree(small_base, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    settings = {"gradient_accumulation_steps": 4, "resume_from_checkpoint": "latest"}
    text = refusal(finished().parent / "pairs.csv", other, output, **settings)
    assert "it was trained with another model (weights of the base model); set" in text
    text = refusal(finished().parent / "pairs.csv", small_base, output, fps=1.0, **settings)
    assert "it was trained with another model (video); set" in text


def test_another_zero_stage_is_refused(finished, small_base, tmp_path, refusal):
    output = tmp_path / "output"
    shutil.copytree(finished(), output)
    settings = {"gradient_accumulation_steps": 4, "resume_from_checkpoint": "latest", "zero": 2}
    assert "zero_stage was 0, now it is 2" in refusal(finished().parent / "pairs.csv", small_base, output, **settings)


def test_unknown_flags_are_errors(clips, small_base, tmp_path):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"])
    status, text = run(data, small_base, tmp_path / "output", learning_rat=1)
    assert status != 0
    assert "--learning_rat" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("zero", [0, 2])
def test_loss_that_is_not_finite_stops_before_the_step_and_names_it(clips, small_base, tmp_path, refusal, zero):
    videos = [repr([str(clips[0]), str(clips[1])])] * 2
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"], videos=videos)  # one is always wrong
    settings = {"gradient_accumulation_steps": 2, "rm_head_lr": 1e30, "zero": zero}  # the first step ruins the head
    text = refusal(data, small_base, tmp_path / "output", **settings)
    assert re.search(r"error: (loss|gradient norm) is not finite at step 2", text)
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_bad_rows_stop_training_before_the_model_is_loaded(clips, small_base, tmp_path, refusal):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "left"])
    hollow = tmp_path / "hollow"  # a base without weights: loading it would fail with another message
    shutil.copytree(small_base, hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    text = refusal(data, hollow, tmp_path / "output")
    assert "row 2 (line " in text
    assert "'left'" in text


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_pair_whose_video_vanishes_is_dropped_and_reported(clips, small_base, tmp_path, share):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips[0].read_bytes())
    videos = [repr([str(clips[0]), str(clips[1])]), repr([str(clips[2]), str(damaged)])]
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"], videos=videos)
    process = start(data, small_base, tmp_path / "output", accumulation=2, max_dropped_share=share)
    wait_for(tmp_path / "output" / "train_log.jsonl", process)  # past the checks, before the first batch
    damaged.write_bytes(b"")
    text, _ = process.communicate(timeout=RUN_SECONDS)
    fault = f"\n  row 2: video is empty (0 bytes): {damaged}"
    if share == 0.5:
        assert process.returncode == 0, text
        assert f"1 pair(s) were dropped:{fault}" in text
    else:
        assert process.returncode != 0
        assert "50.0% of the training pairs could not be loaded, more than --max_dropped_share 0.01" in text
        assert fault in text


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def processes_that_name(text: str) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in path.read_text():
                found.append(path)
    return found


def test_a_folder_in_use_is_refused_and_ranks_end_with_their_launcher(clips, small_base, tmp_path, refusal):
    data, output = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"]), tmp_path / "in_use"
    process = start(data, small_base, output, processes=2, max_steps=100_000, num_train_epochs=100_000)
    wait_for(output / "train_log.jsonl", process)
    assert f"{output} is in use by process " in refusal(data, small_base, output)
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while processes_that_name(str(output)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_bf16_evaluation_full_model_and_limit_on_checkpoints(tmp_path, clips, small_base):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same", "A"])
    output = tmp_path / "output"
    status, text = run(
        data,
        small_base,
        output,
        bf16=True,
        accumulation=1,
        batch=2,
        meta_data_test=data,
        eval_epochs=0.5,
        save_epochs=0.5,
        save_total_limit=1,
        save_only_model=True,
        save_full_model=True,
        loss_type="btt",
        reward_token="mean",
        report_to="tensorboard",
    )
    assert status == 0, text
    checkpoints = list(output.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3"]
    assert not (checkpoints[0] / "deepspeed").exists()
    assert list((output / "runs").iterdir())
    state = json.loads((checkpoints[0] / "trainer_state.json").read_text())
    evaluated = [line for line in state["log_history"] if "eval/accuracy" in line]
    assert len(evaluated) == 3
    assert {"eval/loss", "eval_masked/accuracy", "eval_masked/margin"} <= evaluated[0].keys()
    full = load_reward_model(checkpoints[0] / "full_model")
    assert full.config.reward_token == "mean"
    head = torch.load(checkpoints[0] / "rm_head.pth", weights_only=True)["rm_head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())  # trained in fp32, not rounded


@pytest.mark.slow
@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real clips at {REAL_VIDEOS}")
def test_real_pairs_train_with_nothing_but_data_and_output_changed(tmp_path):
    clips = [REAL_VIDEOS / f"example_{i}_{side}.mp4" for i in (1, 2) for side in "AB"]
    data = write_pairs_csv(tmp_path / "real.csv", clips, labels=["A", "A"])
    environment = os.environ | {"DATA": str(data), "OUTPUT_DIR": str(tmp_path / "output"), "NUM_GPUS": "0"}
    result = subprocess.run(
        ["bash", str(STAGE_DIR / "train.sh")], env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
    )
    assert result.returncode == 0, result.stderr
    loaded = load_reward_model(tmp_path / "output" / "checkpoint-4")
    assert loaded.builder.reward_token_id == loaded.builder.tokenizer.convert_tokens_to_ids("<Reward>")
