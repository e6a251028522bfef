"""What is settled before a model is loaded: where a run resumes, and what it takes over from its base."""

from pathlib import Path

import pytest

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import STATE_FILE, RewardConfig
from preflight import build_config, load_checked_pairs, prepare_output
from scored_sequence import DEFAULT_FORMAT_PROMPT
from stage1_support import SMALL_BUDGET, write_pairs_csv
from trainer_qwen3 import list_checkpoints


def make_checkpoints(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / STATE_FILE).touch()
    return folder


def resume(output: Path, wanted: Path | str) -> Path | None:
    return prepare_output(TrainingArguments(output_dir=str(output), resume_from_checkpoint=str(wanted)))


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


@pytest.mark.parametrize("loss_type", ["scaled", "margin"])
def test_scores_that_contradict_a_label_stop_only_the_loss_that_cannot_use_them(tmp_path, clips, builder, loss_type):
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A"], MOS_A_GSB=[1.5])

    def load() -> int:
        training = TrainingArguments(loss_type=loss_type)
        return len(load_checked_pairs(path, builder, SMALL_BUDGET, data=DataArguments(), training=training))

    if loss_type == "scaled":
        with pytest.raises(ValueError, match=r"row 1: GSB is 'A' and its scores 1\.5 and 2\.5 say the opposite"):
            load()
    else:
        assert load() == 1
