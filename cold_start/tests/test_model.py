"""The packed forward against stock transformers, and what is trained."""

from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch._dynamo.utils import counters
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

import attention
from arguments import ModelArguments
from checkpoint import build_reward_model
from losses import PairLabels, compute_pair_loss
from model_qwen3 import add_reward_token, part_of, prepare_for_training, require_qwen3_vl
from plain_kernels import PlainKernels
from scored_sequence import pack_sequences
from stage1_support import write_small_base

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def stock_hidden_states(small_base, model, builder, sequence) -> torch.Tensor:
    """Final hidden states of one sequence from an unmodified Qwen3-VL, [length, hidden]."""
    stock = Qwen3VLForConditionalGeneration.from_pretrained(small_base).eval()
    with torch.no_grad():
        stock.get_input_embeddings().weight[builder.reward_token_id] = model.reward_embedding
        ids = sequence.input_ids.unsqueeze(0)
        output = stock.model(
            input_ids=ids,
            mm_token_type_ids=(ids == stock.config.video_token_id).int() * 2,
            pixel_values_videos=sequence.pixel_values,
            video_grid_thw=torch.tensor([sequence.grid_thw]),
        )
    return output.last_hidden_state[0]


@pytest.mark.parametrize("mode", ["special", "last", "mean"])
def test_packed_rewards_equal_stock_transformers_one_by_one(small_base, model, builder, sequences, mode):
    model.reward_token = mode
    with torch.no_grad():
        packed = model(pack_sequences(sequences))
        for i, sequence in enumerate(sequences):
            hidden = stock_hidden_states(small_base, model, builder, sequence)
            pooled = {"special": hidden[sequence.reward_position], "last": hidden[-1], "mean": hidden.mean(dim=0)}
            torch.testing.assert_close(packed[i : i + 1], model.rm_head(pooled[mode]), **TOLERANCE)
    assert packed.std() > 1e-3  # inputs must show in the outputs, or the comparison says nothing


def trained_gradients(model, sequences, groups) -> dict[str, torch.Tensor]:
    """BT gradients over two pairs (0, 1) and (2, 3), with sequences run in the given groups of pairs."""
    for parameter in model.parameters():
        parameter.grad = None
    for group in groups:
        rewards = model(pack_sequences([sequences[i] for pair in group for i in (2 * pair, 2 * pair + 1)]))
        count = len(group)
        labels = PairLabels(torch.ones(count), torch.ones(count, dtype=bool), *(torch.full((count,), 3.0),) * 2)
        loss = compute_pair_loss(rewards[0::2], rewards[1::2], labels, loss_type="bt")
        (loss / 2).backward()
    return {name: p.grad.clone() for name, p in model.trainable_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, *, bound: float) -> None:
    """Every parameter's, by relative distance: single small values differ more from one processor to another."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name  # of LoRA's A it is zero


def test_bt_gradient_is_independent_of_micro_batch_size(model, sequences):
    prepare_for_training(model, ModelArguments(gradient_checkpointing=False))
    together = trained_gradients(model, sequences, [[0, 1]])
    separate = trained_gradients(model, sequences, [[0], [1]])
    assert {part_of(name) for name in together} == {"base", "merger", "vision", "token", "head"}
    assert_same_gradients(together, separate, bound=1e-5)


def test_adapters_take_bf16_inputs_as_they_are_and_change_no_gradient(small_base, builder, sequences):
    """Against PEFT's default, which brings inputs to fp32 before autocast brings them back."""
    runs = []
    for casts in (False, True):
        torch.manual_seed(0)
        model = build_reward_model(str(small_base), builder.processor, reward_token="special", dtype=torch.bfloat16)
        prepare_for_training(model, ModelArguments(gradient_checkpointing=False), autocast_dtype=torch.bfloat16)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert layers
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        runs.append(trained_gradients(model, sequences, [[0, 1]]))
    assert_same_gradients(*runs, bound=0.0)


def test_gradient_checkpointing_changes_no_gradient(small_base, builder, sequences):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = build_reward_model(str(small_base), builder.processor, reward_token="special", dtype=torch.float32)
        prepare_for_training(model, ModelArguments(gradient_checkpointing=checkpointing)).train()
        results.append(trained_gradients(model, sequences, [[0, 1]]))
    assert_same_gradients(*results, bound=1e-5)


def gradients_with_and_without_compiling(small_base, builder, run, **settings) -> list[dict[str, torch.Tensor]]:
    """`run`: from a model to its gradients."""
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        model = build_reward_model(str(small_base), builder.processor, reward_token="special", dtype=torch.float32)
        prepare_for_training(model, ModelArguments(**settings)).train()
        if is_compiled:
            model.compile_layers()
        results.append(run(model))
    torch.compiler.reset()
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_no_gradient(small_base, builder, sequences, checkpointing):
    results = gradients_with_and_without_compiling(
        small_base, builder, partial(trained_gradients, sequences=sequences, groups=[[0, 1]]),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert_same_gradients(*results, bound=1e-5)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_layers_compile_once_around_flash_attention(monkeypatch, small_base, builder, sequences, checkpointing):
    """As on a GPU, but for the kernels; in two passes of other lengths."""
    monkeypatch.setattr(attention, "is_for_flash", lambda _: True)
    monkeypatch.setattr(attention, "choose_kernels", lambda _: PlainKernels)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = gradients_with_and_without_compiling(
        small_base, builder, partial(trained_gradients, sequences=sequences, groups=[[1], [0]]),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] == 2  # all text layers, all vision blocks
    assert_same_gradients(*results, bound=1e-5)


def test_one_row_of_the_embedding_is_trained_and_the_matrix_is_frozen(model):
    prepare_for_training(model, ModelArguments())
    trained = dict(model.trainable_parameters())
    assert trained["reward_embedding"].shape == (model.rm_head.in_features,)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"base", "merger", "vision", "token", "head"}),
        ({"freeze_llm": True}, {"merger", "vision", "token", "head"}),
        ({"freeze_vision_tower": True}, {"base", "merger", "token", "head"}),
        ({"freeze_vision_tower": True, "tune_merger": False}, {"base", "token", "head"}),
        ({"freeze_vision_tower": True, "vision_lora": True}, {"base", "merger", "vision", "token", "head"}),
    ],
)
def test_flags_choose_what_is_trained(model, settings, parts):
    prepare_for_training(model, ModelArguments(**settings))
    assert {part_of(name) for name, _ in model.trainable_parameters()} == parts
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable_parameters())


def test_lora_is_on_every_language_linear_but_the_head(model):
    prepare_for_training(model, ModelArguments())
    adapted = {name.split(".lora_")[0] for name, _ in model.trainable_parameters() if ".lora_" in name}
    assert len(adapted) == 7 * model.qwen.config.text_config.num_hidden_layers
    assert all(".language_model.layers." in name for name in adapted)


def test_full_tuning_without_lora_leaves_the_embedding_frozen(model):
    prepare_for_training(model, ModelArguments(lora_enable=False))
    trained = [name for name, _ in model.trainable_parameters()]
    assert any("language_model.layers.0.mlp" in name for name in trained)
    assert not any("embed_tokens" in name or "lora_" in name for name in trained)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 8])
def test_reward_token_never_shrinks_the_embedding(tmp_path, tied, spare_rows):
    base = write_small_base(tmp_path, tied=tied, spare_rows=spare_rows)
    processor = AutoProcessor.from_pretrained(base)
    rows = len(processor.tokenizer) + spare_rows
    token_id = add_reward_token(processor)
    model = build_reward_model(str(base), processor, reward_token="special", dtype=torch.float32)
    assert model.qwen.get_input_embeddings().num_embeddings >= max(rows, token_id + 1)
    before = Qwen3VLForConditionalGeneration.from_pretrained(base).get_input_embeddings().weight
    kept = min(rows, token_id)
    assert torch.equal(model.qwen.get_input_embeddings().weight[:kept], before[:kept])


def test_other_model_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' checkpoint; this project needs a Qwen3-VL one"):
        require_qwen3_vl(str(tmp_path))
    with pytest.raises(ValueError, match="no model that transformers can load"):
        require_qwen3_vl(str(tmp_path / "nothing"))
