"""Training as users launch it: `train.sh`, DeepSpeed, real processes. Runs are shared between tests."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_reward
from checkpoint import load_reward_model
from infer_utils import RewardScorer, evaluate, merge
from stage1_support import SMALL_BUDGET, STAGE_DIR, forkserver, free_port, write_pairs_csv, write_small_base
from verl.model.reward_files import load_checkpoint

SETTINGS = {
    "max_steps": 3,
    "logging_epochs": 0.001,
    "eval_epochs": 100,
    "save_epochs": 100,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "lora_r": 4,
    "lora_alpha": 8,
    "dataloader_num_workers": 0,
    "report_to": "none",
}
RUN_SECONDS = 240
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5  # 1% of a step: Adam makes steps of gradients that are only rounding
TWO_PROCESSES = {"processes": 2, "accumulation": 2}


def start(data, base, output, *, processes=1, zero=None, accumulation=4, batch=1, node=None, **settings):
    """Launch train.sh; returns the process, whose output is captured. `node`: variables of one of several nodes.

    `zero`: ZeRO stage, by default the one that train.sh takes.
    """
    if zero is not None:
        settings["deepspeed"] = STAGE_DIR / f"ds_config/zero{zero}.json"
    settings |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    paths = {"DATA": data, "MODEL_PATH": base, "OUTPUT_DIR": output}
    counts = {"NUM_GPUS": 0, "NUM_PROCESSES": processes, "OMP_NUM_THREADS": 1}
    environment = os.environ | {name: str(value) for name, value in (paths | counts | (node or {})).items()}
    command = ["bash", str(STAGE_DIR / "train.sh"), *flags(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def flags(settings: dict[str, object]) -> list[str]:
    values = {name: value if isinstance(value, list) else [value] for name, value in (SETTINGS | settings).items()}
    return [text for name, several in values.items() for text in (f"--{name}", *map(str, several))]


def run(*arguments, **settings) -> None:
    """A whole run, which must succeed."""
    process = start(*arguments, **settings)
    output, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def refusal():
    """What train_reward.py says about work that it refuses, each time in a process of its own with its imports."""
    context = forkserver()

    def call(data: Path, base: Path, output: Path, *, zero=0, **settings) -> str:
        config = STAGE_DIR / f"ds_config/zero{zero}.json"
        paths = {"meta_data": data, "model_name_or_path": base, "output_dir": output, "deepspeed": config}
        log = output.with_name("refusal.log")
        process = context.Process(target=train_alone, args=(flags(paths | settings), log))
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


def log_lines(output: Path, metric: str) -> list[dict]:
    lines = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [line for line in lines if metric in line]


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    head = torch.load(checkpoint / "rm_head.pth", weights_only=True)
    return head | {
        name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clips, small_base):
    """Trains with the given settings once per module, on `pairs.csv` beside the output folder, which is returned."""
    folder = tmp_path_factory.mktemp("runs")
    labels = ["A", "B", "same", "A", "invalid", "B", "B", "A", "A", "B"]
    data = write_pairs_csv(folder / "pairs.csv", clips, labels=labels)

    @cache
    def run_once(*, has_experts=False, **settings) -> Path:
        output = folder / "-".join([f"run{has_experts}", *(f"{key}{value}" for key, value in settings.items())])
        base = write_small_base(output.with_suffix(".base"), has_experts=True) if has_experts else small_base
        run(data, base, output, meta_data_test=data, per_device_eval_batch_size=3, **settings)
        return output

    return run_once


def assert_same_training(first: Path, second: Path, *, tolerance: float = WEIGHT_TOLERANCE) -> None:
    losses = [[line["loss"] for line in log_lines(output, "loss")] for output in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE)
    (expected,), (found,) = (log_lines(output, "eval/loss") for output in (first, second))
    assert found == pytest.approx(expected, abs=1e-4)
    expected, found = (trained_weights(output / "checkpoint-3") for output in (first, second))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_step_is_logged_and_the_checkpoint_scores(finished, clips):
    output = finished()
    assert [line["step"] for line in log_lines(output, "loss")] == [1, 2, 3]
    assert {"eval/accuracy", "eval_masked/loss", "eval_masked/margin"} <= log_lines(output, "eval/loss")[0].keys()
    scorer = RewardScorer.from_pretrained(output / "checkpoint-3")
    assert scorer.config.video == SMALL_BUDGET
    rewards = scorer.score([str(clips[0]), str(clips[1])], prompts=["a red circle"] * 2)
    assert all(torch.isfinite(torch.tensor(rewards)))
    assert rewards[0] != rewards[1]


def test_several_dimensions_train_one_head_of_which_each_makes_a_model(clips, small_base, tmp_path, monkeypatch):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same"], motion=["B", "", "A"])
    output, merged, result = tmp_path / "run", tmp_path / "merged", tmp_path / "result.json"
    run(data, small_base, output, meta_data_test=data, eval_dim=["GSB", "motion"], max_steps=2)
    checkpoint = output / "checkpoint-2"
    assert {"eval/accuracy/GSB", "eval_masked/accuracy/motion"} <= log_lines(output, "eval/loss")[0].keys()
    scorer = RewardScorer.from_pretrained(checkpoint)
    videos, prompts = [str(clips[0]), str(clips[1])], ["a red circle"] * 2
    motion = scorer.score(videos, prompts, reward_dim="motion")
    assert scorer.score(videos, prompts) == scorer.score(videos, prompts, reward_dim="GSB") != motion

    commands = {
        evaluate: ["evaluate", checkpoint, data, "--modes", "masked", "--output", result],
        merge: ["merge", checkpoint, merged, "--reward_dim", "motion", "--dtype", "float32"],
    }
    for module, arguments in commands.items():
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        module.main()
    for of_dimension in json.loads(result.read_text())["dimensions"].values():
        assert of_dimension["accuracy"]["masked"]["num_pairs"] == 2
    assert RewardScorer.from_pretrained(merged).score(videos, prompts) == pytest.approx(motion, abs=1e-5)
    with pytest.raises(ValueError, match=r"gives 2 rewards.*--reward_dim NAME"):
        load_checkpoint(checkpoint, with_weights=False)
    assert len(load_checkpoint(merged, with_weights=False).head_weight) == 1


@pytest.mark.parametrize(
    "settings",
    [
        TWO_PROCESSES,  # ZeRO-2, train.sh's choice for several
        pytest.param({"batch": 4, "accumulation": 1}, marks=pytest.mark.slow),
        pytest.param(TWO_PROCESSES | {"zero": 3}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes_micro_batches_zero_and_recomputation_change_nothing(finished, settings):
    changed = finished(**settings)
    assert_same_training(finished(), changed)
    stage = json.loads((changed / "checkpoint-3" / "trainer_state.json").read_text())["zero_stage"]
    assert stage == settings.get("zero", 2 if "processes" in settings else 0)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_experts_train_in_two_processes_as_in_one(finished, zero):
    """LoRA on the attention; then every weight of the language model, experts that few tokens choose included."""
    for lora, tolerance in ((True, WEIGHT_TOLERANCE), (False, 1e-4)):
        settings = {"has_experts": True, "lora_enable": lora}
        parts = finished(**settings, **TWO_PROCESSES, zero=zero)
        assert_same_training(finished(**settings), parts, tolerance=tolerance)


@pytest.mark.slow
def test_two_nodes_train_as_one_process(finished, small_base, tmp_path):
    """Two nodes with a process each, here on one machine under two names."""
    data = finished().parent / "pairs.csv"
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    variables = {"HOSTFILE": tmp_path / "hosts", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    settings = {"meta_data_test": data, "per_device_eval_batch_size": 3, "accumulation": 2}
    nodes = [
        start(data, small_base, tmp_path / "run", node={**variables, "NODE_RANK": rank}, **settings)
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=RUN_SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_training(finished(), tmp_path / "run")


def test_killed_run_holds_its_folder_until_then_and_resumes_as_if_uninterrupted(
    finished, small_base, tmp_path, refusal
):
    data, output = finished(**TWO_PROCESSES).parent / "pairs.csv", tmp_path / "killed"
    settings = {"save_epochs": 0.001, "meta_data_test": data, "per_device_eval_batch_size": 3, **TWO_PROCESSES}
    process = start(data, small_base, output, **settings | {"max_steps": 10**5, "num_train_epochs": 10**5})
    wait_until((output / "checkpoint-2").exists, process)
    assert f"{output} is in use by process " in refusal(data, small_base, output)
    os.kill(process.pid, signal.SIGKILL)  # the launcher alone; its ranks must end with it
    wait_until(lambda: not is_running(str(output)), seconds=20)
    for checkpoint in output.glob("checkpoint-*"):
        if checkpoint.name not in ("checkpoint-1", "checkpoint-2"):
            shutil.rmtree(checkpoint)
    (output / "tmp-checkpoint-9").mkdir(exist_ok=True)  # what a kill in the middle of writing leaves
    with (output / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    run(data, small_base, output, **settings, resume_from_checkpoint="latest")
    assert not list(output.glob("tmp-*"))
    assert_same_training(finished(**TWO_PROCESSES), output)


def wait_until(
    is_done: Callable[[], bool], process: subprocess.Popen | None = None, *, seconds: float = RUN_SECONDS
) -> None:
    """Wait, at most so long, and only while `process` runs."""
    deadline = time.monotonic() + seconds
    while not is_done():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_running(argument: str) -> bool:
    """Whether a process has `argument` in its command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument in path.read_text():
                return True
    return False


def test_used_folder_and_resuming_with_another_setup_are_refused(finished, clips, small_base, tmp_path, refusal):
    """Frozen weights are in no checkpoint: a run that went on from another base would mix the two."""
    output, other = tmp_path / "output", tmp_path / "other"
    shutil.copytree(finished(), output)
    shutil.copytree(small_base, other)
    weights = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"])
    text = refusal(data, small_base, output)
    assert "already holds checkpoint-3. Resume it with --resume_from_checkpoint latest" in text
    text = refusal(data, other, output, resume_from_checkpoint="latest", zero=2, fps=1.0)
    assert "cannot resume from" in text
    assert "num_pairs was 10, now it is 2; " in text
    assert "zero_stage was 0, now it is 2; " in text
    assert re.search(r"base_weights was \w{16}, now it is \w{16}; video was .* now it is VideoBudget\(fps=1\.0", text)


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow)])
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
    assert re.search(r"row 2 \(line .*'left'", text)


@pytest.mark.parametrize("share", [0.01, pytest.param(0.5, marks=pytest.mark.slow)])
def test_pair_whose_video_vanishes_is_dropped_and_reported(clips, small_base, tmp_path, share):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips[0].read_bytes())
    videos = [repr([str(clips[0]), str(clips[1])]), repr([str(clips[2]), str(damaged)])]
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"], videos=videos)
    process = start(data, small_base, tmp_path / "output", accumulation=2, max_dropped_share=share)
    wait_until((tmp_path / "output" / "train_log.jsonl").exists, process)  # past the checks, before the first batch
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


@pytest.mark.slow
def test_bf16_evaluation_full_model_and_limit_on_checkpoints(tmp_path, clips, small_base):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same", "A"])
    output = tmp_path / "output"
    epochs = {"eval_epochs": 0.5, "save_epochs": 0.5, "save_total_limit": 1}
    options = {"bf16": True, "save_only_model": True, "save_full_model": True, "loss_type": "btt"}
    sizes = {"accumulation": 1, "batch": 2, "meta_data_test": data}
    run(data, small_base, output, **epochs, **options, **sizes, reward_token="mean", report_to="tensorboard")
    (checkpoint,) = output.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    assert not (checkpoint / "deepspeed").exists()
    assert list((output / "runs").iterdir())
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert len([line for line in state["log_history"] if "eval/accuracy" in line]) == 3
    full = load_reward_model(checkpoint / "full_model")
    assert full.config.reward_token == "mean"
    head = torch.load(checkpoint / "rm_head.pth", weights_only=True)["rm_head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())  # trained in fp32, not rounded
