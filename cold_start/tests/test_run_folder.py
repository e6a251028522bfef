"""What is settled before a model is loaded: where a run resumes, and what it takes over from its base."""

import json
from pathlib import Path

import pytest

from arguments import TrainingArguments
from checkpoint import STATE_FILE, RewardConfig
from engine import read_deepspeed_config
from run_folder import find_resume, list_checkpoints
from scored_sequence import DEFAULT_FORMAT_PROMPT
from stage1_support import SMALL_BUDGET


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with two checkpoints, and two folders with other names."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-10-backup", "checkpoint-"):
        (tmp_path / "output" / name).mkdir(parents=True)
        (tmp_path / "output" / name / STATE_FILE).touch()
    return tmp_path / "output"


def resume(output: Path, wanted: Path | str) -> Path | None:
    return find_resume(TrainingArguments(output_dir=str(output), resume_from_checkpoint=str(wanted)))


def test_a_run_resumes_from_the_last_checkpoint_of_a_folder_or_into_a_new_one(output, tmp_path):
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-9", "checkpoint-10"]
    assert resume(output, output / "checkpoint-10") == output / "checkpoint-10"
    assert resume(output, "latest") == output / "checkpoint-10"
    assert resume(tmp_path / "new", output / "checkpoint-9") == output / "checkpoint-9"


def test_resuming_that_would_mix_two_runs_is_refused(output, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / STATE_FILE).touch()
    with pytest.raises(ValueError, match=r"Remove checkpoint-10, or choose another --output_dir"):
        resume(output, output / "checkpoint-9")
    with pytest.raises(ValueError, match="already holds checkpoint-9, checkpoint-10, which"):
        resume(output, tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not a checkpoint-N folder with trainer_state\.json in it"):
        resume(output, tmp_path)


def test_format_prompt_of_the_base_holds_unless_another_is_given(tmp_path, caplog):
    assert RewardConfig.resolve(tmp_path).format_prompt == DEFAULT_FORMAT_PROMPT
    RewardConfig(base_model=None, video=SMALL_BUDGET, format_prompt="So: {{ content }}").save(tmp_path)
    assert RewardConfig.resolve(tmp_path).format_prompt == "So: {{ content }}"
    assert caplog.text == ""
    (tmp_path / "mine.jinja").write_text("{{ content }}!")
    given = str(tmp_path / "mine.jinja")
    assert RewardConfig.resolve(tmp_path, format_prompt=given).format_prompt == "{{ content }}!"
    assert f"flags override the format prompt of {tmp_path}" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", '{"video": {"speed": 2}}', '{"video": {}, "else": 1}'])
def test_a_damaged_reward_config_is_named(tmp_path, content):
    (tmp_path / "reward_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"reward_config\.json is damaged"):
        RewardConfig.find(tmp_path)


def test_a_deepspeed_config_may_not_repeat_what_flags_set(tmp_path):
    path, arguments = tmp_path / "zero.json", TrainingArguments(max_grad_norm=0.5)
    path.write_text(json.dumps({"bf16": {}, "fp16": {"enabled": False}, "optimizer": "auto"}))
    assert read_deepspeed_config(str(path), arguments)["gradient_clipping"] == 0.5
    for name, value in (("bf16", {"enabled": True}), ("optimizer", {"type": "Adam"}), ("gradient_clipping", 0)):
        path.write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=rf"zero\.json: remove '{name}'; "):
            read_deepspeed_config(str(path), arguments)


def test_learning_rates_that_are_not_set_follow_the_one_that_is():
    rates = TrainingArguments(learning_rate=1e-4, vision_lr=1e-6).learning_rates
    assert rates == {"base": 1e-4, "merger": 1e-4, "vision": 1e-6, "token": 1e-4, "head": 1e-4}
