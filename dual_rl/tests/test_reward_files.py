"""Checkpoints between the stages: what stage 1 wrote scores the same here, and what is written here scores there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from arguments import ModelArguments
from checkpoint import RewardConfig, build_reward_model, load_reward_model, save_reward_files
from model_qwen3 import add_reward_token, prepare_for_training
from model_support import (
    SMALL_BUDGET,
    hub_weights,
    make_builder,
    make_group,
    make_policy,
    pixels_of,
    problem_of,
    write_small_model,
)
from scored_sequence import pack_sequences
from verl.core.packing import pack_groups
from verl.data.vision_process import VideoBudget
from verl.model.reward_files import PolicyCheckpoint, load_checkpoint, load_head, save_policy
from vision_process import VideoBudget as Stage1Budget

LENGTHS = [[9, 4], [0, 12]]


def stage1_checkpoint(folder, base, **settings):
    """What stage 1 would write after some training: all that is trained has moved."""
    processor = AutoProcessor.from_pretrained(base)
    add_reward_token(processor)
    torch.manual_seed(3)
    model = build_reward_model(str(base), processor, RewardConfig(), dtype=torch.float32)
    prepare_for_training(model, ModelArguments(lora_r=8, lora_alpha=24, **settings))
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    budget = Stage1Budget(**vars(SMALL_BUDGET))
    config = RewardConfig(base_model=str(base), video=budget, format_prompt="So: {{ content }}")
    save_reward_files(
        folder, model=model, weights=dict(model.trainable_parameters()), processor=processor, config=config
    )
    return folder


@torch.no_grad()
def rewards_here(checkpoint: PolicyCheckpoint) -> torch.Tensor:
    builder = make_builder(checkpoint)
    groups = [make_group(builder, number, lengths) for number, lengths in enumerate(LENGTHS)]
    model = make_policy(checkpoint).eval()
    return model(pack_groups(groups, builder), None, pixels_of(groups, builder), temperature=None).rewards


@torch.no_grad()
def rewards_in_stage_1(folder, checkpoint: PolicyCheckpoint) -> torch.Tensor:
    """By stage 1's loader, builder and forward, from the same clips, problems and ids."""
    loaded = load_reward_model(folder)
    builder = make_builder(checkpoint)
    sequences = []
    for number, lengths in enumerate(LENGTHS):
        prompt, responses = make_group(builder, number, lengths)
        encoded = loaded.builder.encode_prompt(problem_of(number), prompt.video)
        assert torch.equal(encoded.input_ids, prompt.input_ids)
        sequences += [loaded.builder.build(encoded, response.cot_ids) for response in responses]
    return loaded.model(pack_sequences(sequences))[:, 0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ({"tied": True}, {}),
        ({"spare_rows": 0}, {"lora_enable": False}),
        ({}, {"freeze_vision_tower": True, "vision_lora": True}),
        ({"has_experts": True}, {}),
        ({"has_experts": True, "spare_rows": 0}, {"lora_enable": False}),
    ],
    ids=["lora_tied", "full_grown_embedding", "vision_lora", "lora_experts", "full_experts"],
)
def test_stage_1_checkpoint_gives_the_same_rewards_here(tmp_path, kind, settings):
    base = write_small_model(tmp_path / "base", has_reward=False, **kind)
    folder = stage1_checkpoint(tmp_path / "checkpoint-1", base, **settings)
    checkpoint = load_checkpoint(folder, with_weights=True)
    found, expected = rewards_here(checkpoint), rewards_in_stage_1(folder, checkpoint)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    assert checkpoint.video_budget == SMALL_BUDGET
    assert checkpoint.format_prompt == "So: {{ content }}"

    light = load_checkpoint(folder, with_weights=False)
    assert light.weights is None
    assert torch.equal(light.reward_embedding, checkpoint.reward_embedding)
    assert light.config.text_config.vocab_size == checkpoint.weights["lm_head.weight"].shape[0]

    shutil.rmtree(base)
    with pytest.raises(ValueError, match="which is gone"):
        load_checkpoint(folder, with_weights=False)


@pytest.mark.parametrize(
    ("kind", "shard_bytes"),
    [({}, 10**9), ({"tied": True}, 200_000), ({"has_experts": True}, 10**9)],
    ids=["whole", "tied, in shards", "experts"],
)
def test_saved_policy_scores_the_same_in_both_stages(tmp_path, kind, shard_bytes):
    checkpoint = load_checkpoint(write_small_model(tmp_path / "start", **kind), with_weights=True)
    model = make_policy(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    saved, weights = tmp_path / "huggingface", hub_weights(model)
    save_policy(
        saved,
        weights=iter(weights.items()),
        head_weight=model.rm_head.weight,
        checkpoint=checkpoint,
        shard_bytes=shard_bytes,
    )
    assert (saved / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    assert not list(saved.glob("*.tmp"))
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~umask}
    again = load_checkpoint(saved, with_weights=True)
    torch.testing.assert_close(rewards_in_stage_1(saved, again), rewards_here(again), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.reward_embedding, model.reward_embedding.detach())
    stock = AutoModelForImageTextToText.from_pretrained(saved).state_dict()
    assert all(torch.equal(stock[name], tensor) for name, tensor in weights.items())
    for path in saved.glob("*.safetensors"):
        for name, tensor in load_file(path).items():  # experts as published: [experts, inputs, outputs]
            assert not name.endswith("experts.down_proj") or tensor.shape[1] > tensor.shape[2]
    assert again.generation_config.to_dict() == checkpoint.generation_config.to_dict()
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"


@pytest.fixture
def copied(tmp_path, small_model) -> Path:
    """A copy of the model to damage."""
    return shutil.copytree(small_model, tmp_path / "model")


def test_a_missing_head_is_named_and_head_path_replaces_it(tmp_path, copied):
    elsewhere = tmp_path / "heads"
    elsewhere.mkdir()
    shutil.move(copied / "rm_head.pth", elsewhere / "rm_head.pth")
    with pytest.raises(ValueError, match="head_path"):
        load_checkpoint(copied, with_weights=False)
    heads = [load_checkpoint(copied, path, with_weights=False) for path in (elsewhere, elsewhere / "rm_head.pth")]
    assert torch.equal(heads[0].head_weight, heads[1].head_weight)


@pytest.mark.parametrize("key", ["rm_head.weight", "base_model.model.rm_head.weight"])
@pytest.mark.parametrize("nested", [False, True])
def test_heads_are_read_in_every_layout(tmp_path, key, nested):
    weight = torch.randn(1, 4)
    torch.save({"model": {key: weight}} if nested else {key: weight}, tmp_path / "rm_head.pth")
    assert torch.equal(load_head(tmp_path / "rm_head.pth", hidden_size=4), weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": torch.zeros(1, 4)}, r"no rm_head\.weight .* in it, only model"),
        (torch.zeros(1, 4), r"no rm_head\.weight .* in it, only a Tensor"),
        ({"rm_head.weight": torch.zeros(1, 64)}, r"\(1, 64\) .* hidden size is 4"),
        (b"", r"torch cannot load the head: \w"),
        (b"version https://git-lfs.github.com/spec/v1", r"torch cannot load the head: \w"),
    ],
)
def test_other_heads_are_errors_that_name_the_file(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "rm_head.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "rm_head.pth")
    with pytest.raises(ValueError, match=rf"rm_head\.pth: .*{message}"):
        load_head(tmp_path / "rm_head.pth", hidden_size=4)


def test_a_format_prompt_cannot_run_code(tmp_path, copied):
    trace, values = tmp_path / "trace", json.loads((copied / "reward_config.json").read_text())
    values["format_prompt"] = f"{{{{ cycler.__init__.__globals__.os.system('touch {trace}') }}}}"
    (copied / "reward_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"reward_config\.json: the format prompt does not render: SecurityError"):
        load_checkpoint(copied, with_weights=False)
    assert not trace.exists()


def test_other_reward_modes_are_refused(copied):
    values = json.loads((copied / "reward_config.json").read_text())
    (copied / "reward_config.json").write_text(json.dumps({**values, "reward_token": "mean"}))
    with pytest.raises(ValueError, match="--reward_token mean"):
        load_checkpoint(copied, with_weights=False)
    (copied / "reward_config.json").unlink()
    assert load_checkpoint(copied, with_weights=False).video_budget == VideoBudget()


@pytest.mark.parametrize(
    ("model_type", "reason"), [("llama", "another family"), ("qwen3_5", "linear attention"), ("qwen2_5_vl", "windows")]
)
def test_other_families_are_refused_by_their_config_alone(tmp_path, model_type, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = f"is a '{model_type}' model, which is not supported: .*{reason}.* Give a Qwen3-VL one"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, with_weights=False)
