"""What is settled before a model is loaded: where a run resumes, and what it takes over from its base."""

import multiprocessing
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoProcessor

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import STATE_FILE, RewardConfig
from model_qwen3 import add_reward_token
from preflight import build_config, find_resume, load_checked_pairs
from scored_sequence import DEFAULT_FORMAT_PROMPT, SequenceBuilder
from stage1_support import SMALL_BUDGET, TINY_BASE, write_pairs_csv
from trainer_qwen3 import list_checkpoints
from utils import run_on_main_process

COLLECTIVE_SECONDS = 2
NUM_SLOW_ROWS = 1500


def make_checkpoints(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / STATE_FILE).touch()
    return folder


def resume(output: Path, wanted: Path | str) -> Path | None:
    return find_resume(TrainingArguments(output_dir=str(output), resume_from_checkpoint=str(wanted)))


def test_resuming_from_the_last_checkpoint_is_accepted(tmp_path):
    output = make_checkpoints(tmp_path / "output", "checkpoint-5", "checkpoint-10")
    assert resume(output, output / "checkpoint-10") == output / "checkpoint-10"
    assert resume(output, "latest") == output / "checkpoint-10"
    assert resume(tmp_path / "new", output / "checkpoint-5") == output / "checkpoint-5"


def test_resuming_from_before_the_last_checkpoint_names_those_in_the_way(tmp_path):
    output = make_checkpoints(tmp_path / "output", "checkpoint-5", "checkpoint-10", "checkpoint-15")
    with pytest.raises(
        ValueError, match=r"already holds checkpoint-10, checkpoint-15, which .* with another run"
    ) as caught:
        resume(output, output / "checkpoint-5")
    assert "remove checkpoint-10, checkpoint-15, or choose another --output_dir (OUTPUT_DIR)" in str(caught.value)


def test_resuming_from_elsewhere_into_a_used_folder_is_refused(tmp_path):
    output = make_checkpoints(tmp_path / "output", "checkpoint-5")
    other = make_checkpoints(tmp_path / "other", "checkpoint-10")
    with pytest.raises(ValueError, match="already holds checkpoint-5, which"):
        resume(output, other / "checkpoint-10")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-5 is not a checkpoint-N folder with trainer_state\.json in it"):
        resume(tmp_path / "output", tmp_path / "checkpoint-5")


def test_folders_with_other_names_are_no_checkpoints(tmp_path):
    output = make_checkpoints(
        tmp_path / "output", "checkpoint-9", "checkpoint-10", "checkpoint-10-backup", "checkpoint-"
    )
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-9", "checkpoint-10"]


def test_format_prompt_of_the_base_holds_unless_another_is_given(tmp_path, caplog):
    base = ModelArguments(model_name_or_path=str(tmp_path))
    assert build_config(base, DataArguments()).format_prompt == DEFAULT_FORMAT_PROMPT
    RewardConfig(base_model=None, video=SMALL_BUDGET, format_prompt="So: {{ content }}").save(tmp_path)
    assert build_config(base, DataArguments()).format_prompt == "So: {{ content }}"
    assert caplog.text == ""

    (tmp_path / "mine.jinja").write_text("{{ content }}!")
    given = DataArguments(format_prompt=str(tmp_path / "mine.jinja"))
    assert build_config(base, given).format_prompt == "{{ content }}!"
    assert f"flags override the format prompt of {tmp_path}" in caplog.text


def test_learning_rates_that_are_not_set_follow_the_one_that_is():
    rates = TrainingArguments(learning_rate=1e-4, vision_lr=1e-6).learning_rates
    assert rates == {"base": 1e-4, "merger": 1e-4, "vision": 1e-6, "token": 1e-4, "head": 1e-4}
    assert set(TrainingArguments().learning_rates.values()) == {2e-6}


def check_on_two_ranks(rank: int, port: int, path: Path, log: Path) -> None:
    """Check a CSV in a group whose collectives give up after `COLLECTIVE_SECONDS`."""
    wait = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=wait)
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    add_reward_token(processor)
    start = time.monotonic()
    try:
        builder = SequenceBuilder(processor)
        load_checked_pairs(str(path), builder, SMALL_BUDGET, data=DataArguments(), training=TrainingArguments())
    except ValueError as error:
        log.with_suffix(f".{rank}").write_text(f"{time.monotonic() - start}\n{error}")
    run_on_main_process(lambda: time.sleep(1.5 * COLLECTIVE_SECONDS))  # as merging a full model may
    dist.barrier()


@pytest.fixture
def slow_csv(tmp_path, clips) -> Path:
    """Pairs of which the second rank's share takes far longer than a collective may; the last row is faulty."""
    rows = []
    for index in range(NUM_SLOW_ROWS):
        link = tmp_path / f"{index}.mp4"
        link.symlink_to(clips[0])
        rows.append(repr([str(link), str(clips[1])] if index % 2 else [str(clips[0]), str(clips[1])]))
    rows[-1] = repr([str(clips[0]), "gone.mp4"])
    return write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"] * NUM_SLOW_ROWS, videos=rows)


def test_a_check_may_take_longer_than_a_collective(tmp_path, slow_csv):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    ranks = [context.Process(target=check_on_two_ranks, args=(rank, port, slow_csv, log)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()  # only one that hangs is still there
    assert [rank.exitcode for rank in ranks] == [0, 0]
    for rank in range(2):
        seconds, message = log.with_suffix(f".{rank}").read_text().split("\n", 1)
        assert float(seconds) > COLLECTIVE_SECONDS
        assert f"1 fault(s)\n  row {NUM_SLOW_ROWS}: video not found" in message


@pytest.mark.parametrize("loss_type", ["scaled", "margin"])
def test_scores_that_contradict_a_label_stop_only_the_loss_that_cannot_use_them(tmp_path, clips, builder, loss_type):
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"], MOS_A_GSB=[1.5])

    def load() -> int:
        training = TrainingArguments(loss_type=loss_type)
        return len(load_checked_pairs(path, builder, SMALL_BUDGET, data=DataArguments(), training=training))

    if loss_type == "scaled":
        with pytest.raises(
            ValueError, match=r"row 1 \(line 2\): GSB is 'A' and its scores 1\.5 and 2\.5 say the opposite"
        ):
            load()
    else:
        assert load() == 1
