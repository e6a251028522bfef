"""Checkpoint files: what is written is what is loaded, by this project and by PEFT alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from arguments import ModelArguments
from checkpoint import (
    RewardConfig,
    build_reward_model,
    load_head,
    load_reward_model,
    require_trainable_base,
    save_merged,
    save_reward_files,
)
from model_qwen3 import RewardModel, add_reward_token, load_backbone, prepare_for_training
from scored_sequence import pack_sequences
from stage1_support import SMALL_BUDGET, write_small_base
from vision_process import VideoBudget

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make_trained(base, settings) -> tuple[RewardModel, object]:
    """A model prepared with `settings` whose trained weights have all moved."""
    processor = AutoProcessor.from_pretrained(base)
    add_reward_token(processor)
    torch.manual_seed(3)
    model = build_reward_model(str(base), processor, RewardConfig(), dtype=torch.float32)
    prepare_for_training(model, ModelArguments(lora_r=8, lora_alpha=24, **settings))
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval(), processor


def save(folder, base, model, processor) -> None:
    weights = dict(model.trainable_parameters())
    config = RewardConfig(base_model=str(base), video=SMALL_BUDGET)
    save_reward_files(folder, model=model, weights=weights, processor=processor, config=config)


@pytest.fixture(scope="module")
def trained(small_base, tmp_path_factory) -> tuple[RewardModel, Path]:
    """A trained model, and a folder with its `checkpoint-1` and `merged`."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = make_trained(small_base, {})
    save(folder / "checkpoint-1", small_base, model, processor)
    save_merged(folder / "merged", load_reward_model(folder / "checkpoint-1"))
    return model, folder


@torch.no_grad()
def rewards_of(model, sequences) -> torch.Tensor:
    return model(pack_sequences(sequences))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ({"tied": True}, {}),
        ({"spare_rows": 0}, {}),
        ({}, {"freeze_vision_tower": True, "vision_lora": True}),
        ({}, {"lora_enable": False}),
        ({"has_experts": True}, {}),
        ({"has_experts": True, "spare_rows": 0}, {"lora_enable": False}),
    ],
)
def test_saved_loaded_and_merged_models_give_the_same_rewards(tmp_path, sequences, kind, settings):
    base = write_small_base(tmp_path / "base", **kind)
    model, processor = make_trained(base, settings)
    expected = rewards_of(model, sequences)
    assert expected.std() > 1e-3
    save(tmp_path / "checkpoint-1", base, model, processor)
    loaded = load_reward_model(tmp_path / "checkpoint-1")
    torch.testing.assert_close(rewards_of(loaded.model, sequences), expected, **TOLERANCE)
    assert loaded.config.video == SMALL_BUDGET

    save_merged(tmp_path / "merged", loaded)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob("[cm]*/*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        # As published: [experts, inputs, outputs].
        assert not name.endswith("experts.down_proj") or tensor.shape[1] > tensor.shape[2]
    merged = load_reward_model(tmp_path / "merged")
    torch.testing.assert_close(rewards_of(merged.model, sequences), expected, **TOLERANCE)


def test_only_the_reward_row_of_the_embedding_differs_from_the_base(small_base, trained, builder):
    model, folder = trained
    before, after = (
        Qwen3VLForConditionalGeneration.from_pretrained(path).get_input_embeddings().weight
        for path in (small_base, folder / "merged")
    )
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [builder.reward_token_id]
    torch.testing.assert_close(after[builder.reward_token_id], model.reward_embedding.detach())


def test_adapter_is_loaded_by_peft_alone(small_base, tmp_path, sequences):
    model, processor = make_trained(small_base, {"freeze_vision_tower": True, "tune_merger": False})
    save(tmp_path / "checkpoint-1", small_base, model, processor)
    backbone = load_backbone(str(small_base), dtype=torch.float32, num_tokens=len(processor.tokenizer))
    adapted = PeftModel.from_pretrained(backbone, tmp_path / "checkpoint-1").eval()
    sequence = sequences[0]
    with torch.no_grad():
        row = adapted.get_input_embeddings()(sequence.input_ids[sequence.reward_position :][:1])[0]
        alone = RewardModel(adapted, reward_embedding=row).eval()
        states = [one.compute_hidden_states(pack_sequences([sequence])) for one in (model, alone)]
    torch.testing.assert_close(row, model.reward_embedding.detach())
    torch.testing.assert_close(states[0], states[1], **TOLERANCE)
    config = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 24)


@pytest.mark.parametrize("key", ["rm_head.weight", "base_model.model.rm_head.weight"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_heads_are_read_in_every_layout(tmp_path, key, is_nested):
    weight = torch.randn(1, 4)
    torch.save({"model": {key: weight}} if is_nested else {key: weight}, tmp_path / "rm_head.pth")
    assert torch.equal(load_head(tmp_path / "rm_head.pth", num_rewards=1, hidden_size=4), weight)


def test_unusable_heads_are_errors_never_a_random_head(tmp_path):
    path = tmp_path / "rm_head.pth"
    with pytest.raises(ValueError, match="no reward head at"):
        load_head(path, num_rewards=1, hidden_size=4)
    torch.save({"rm_head.weight": torch.randn(1, 4)}, path)
    with pytest.raises(ValueError, match=r"head of shape \(1, 4\), not \(1, 8\)"):
        load_head(path, num_rewards=1, hidden_size=8)
    for content in ({"other": torch.randn(1, 4)}, torch.randn(1, 4), {"model": 1}, {"rm_head.weight": [1.0]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"rm_head\.pth: no rm_head\.weight"):
            load_head(path, num_rewards=1, hidden_size=4)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rm_head\.pth: no head that torch can load: .*copy the checkpoint"):
            load_head(path, num_rewards=1, hidden_size=4)


def test_a_format_prompt_cannot_run_code(small_base, trained, tmp_path):
    trace, folder, mine = tmp_path / "trace", tmp_path / "checkpoint-1", tmp_path / "mine.jinja"
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {trace}') }}}}"
    mine.write_text(template)
    shutil.copytree(trained[1] / "checkpoint-1", folder)
    RewardConfig(base_model=str(small_base), video=SMALL_BUDGET, format_prompt=template).save(folder)
    for load in (load_reward_model, RewardConfig.resolve):
        with pytest.raises(ValueError, match=r"checkpoint-1/reward_config\.json: the format prompt does not render"):
            load(folder)
    with pytest.raises(ValueError, match="--format_prompt: the format prompt does not render"):
        RewardConfig.resolve(small_base, format_prompt=mine)
    assert not trace.exists()


def test_incomplete_checkpoints_are_named(small_base, trained, tmp_path):
    with pytest.raises(ValueError, match=r"holds no rm_head\.pth"):
        load_reward_model(tmp_path)
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(trained[1] / "checkpoint-1", folder)
    RewardConfig(base_model=str(tmp_path / "gone"), video=SMALL_BUDGET).save(folder)
    with pytest.raises(ValueError, match=r"trained from .*gone, which is gone.* --base_model"):
        load_reward_model(folder)
    assert load_reward_model(folder, base_model=str(small_base)).config.video == SMALL_BUDGET


def test_video_budget_of_the_model_holds_unless_flags_override_it(trained, tmp_path, caplog):
    assert RewardConfig.resolve(tmp_path, fps=None).video == VideoBudget()
    assert RewardConfig.resolve(trained[1] / "merged", fps=None).video == SMALL_BUDGET
    assert caplog.text == ""
    assert RewardConfig.resolve(trained[1] / "merged", fps=3.0).video == SMALL_BUDGET.replace(fps=3.0)
    assert "flags override the video budget" in caplog.text


def test_training_can_start_from_a_merged_reward_model(trained, builder, sequences):
    model, folder = trained
    with pytest.raises(ValueError, match="merge it first"):
        require_trainable_base(str(folder / "checkpoint-1"))
    merged = str(folder / "merged")
    require_trainable_base(merged)
    start = build_reward_model(merged, builder.processor, RewardConfig(), dtype=torch.float32)
    torch.testing.assert_close(rewards_of(start.eval(), sequences), rewards_of(model, sequences), **TOLERANCE)
    other = build_reward_model(merged, builder.processor, RewardConfig(reward_token="mean"), dtype=torch.float32)
    assert other.reward_token == "mean"
