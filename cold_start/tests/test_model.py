"""The packed forward against stock transformers, and what is trained."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

import attention
from arguments import ModelArguments
from checkpoint import RewardConfig, build_reward_model
from losses import PairLabels, compute_pair_loss
from model_qwen3 import RewardModel, add_reward_token, part_of, prepare_for_training, require_qwen3_vl
from plain_kernels import PlainKernels
from scored_sequence import pack_sequences
from stage1_support import write_small_base

BF16_EXPERTS = {"has_experts": True, "dtype": torch.bfloat16, "autocast_dtype": torch.bfloat16}  # as on a GPU
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def stock_hidden_states(stock, sequence) -> torch.Tensor:
    """Final hidden states of one sequence from an unmodified Qwen3-VL, [length, hidden]."""
    ids = sequence.input_ids.unsqueeze(0)
    return stock.model(
        input_ids=ids,
        mm_token_type_ids=(ids == stock.config.video_token_id).int() * 2,
        pixel_values_videos=sequence.pixel_values,
        video_grid_thw=torch.tensor([sequence.grid_thw]),
    ).last_hidden_state[0]


@pytest.fixture(scope="module")
def bases(small_base, tmp_path_factory) -> tuple[Path, Path]:
    """Dense, and with experts."""
    return small_base, write_small_base(tmp_path_factory.mktemp("experts"), has_experts=True)


@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
@torch.no_grad()
def test_packed_rewards_equal_stock_transformers_one_by_one(bases, make_model, builder, sequences, has_experts):
    stock = AutoModelForImageTextToText.from_pretrained(bases[has_experts]).eval()
    model = make_model(has_experts=has_experts, lora_enable=False).eval()
    stock.get_input_embeddings().weight[builder.reward_token_id] = model.reward_embedding
    packed = {}
    for mode in ("special", "last", "mean"):
        model.reward_token = mode
        packed[mode] = model(pack_sequences(sequences))
    for i, sequence in enumerate(sequences):
        hidden = stock_hidden_states(stock, sequence)
        pooled = {"special": hidden[sequence.reward_position], "last": hidden[-1], "mean": hidden.mean(dim=0)}
        for mode, state in pooled.items():
            torch.testing.assert_close(packed[mode][i], model.rm_head(state), **TOLERANCE)
    assert packed["special"].std() > 1e-3  # inputs must show in the outputs, or the comparison says nothing


def trained_gradients(model, sequences, groups) -> dict[str, torch.Tensor]:
    """BT gradients over two pairs (0, 1) and (2, 3), with sequences run in the given groups of pairs."""
    for parameter in model.parameters():
        parameter.grad = None
    for group in groups:
        rewards = model(pack_sequences([sequences[i] for pair in group for i in (2 * pair, 2 * pair + 1)]))
        count = len(group)
        scores = torch.full((count, 1), 3.0)
        labels = PairLabels(torch.ones(count, 1), torch.ones(count, 1, dtype=bool), scores, scores)
        loss = compute_pair_loss(rewards[0::2], rewards[1::2], labels, loss_type="bt")
        (loss / 2).backward()
    return {name: p.grad.clone() for name, p in model.trainable_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, *, bound: float) -> None:
    """Every parameter's, by relative distance: single small values differ more from one processor to another."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name  # of LoRA's A it is zero


@pytest.fixture
def make_model(bases, builder):
    """Makes the same model again and again, prepared for training with the given settings."""

    def make(*, has_experts=False, dtype=torch.float32, autocast_dtype=None, **settings) -> RewardModel:
        torch.manual_seed(1)
        model = build_reward_model(str(bases[has_experts]), builder.processor, RewardConfig(), dtype=dtype)
        return prepare_for_training(model, ModelArguments(**settings), autocast_dtype=autocast_dtype).train()

    return make


@pytest.mark.parametrize(
    "kind",
    [{}, {"has_experts": True}, {"has_experts": True, "lora_enable": False}],
    ids=["dense", "experts", "tuned_experts"],
)
def test_gradients_depend_neither_on_micro_batches_nor_on_checkpointing(make_model, sequences, kind):
    model = make_model(gradient_checkpointing=False, **kind)
    together = trained_gradients(model, sequences, [[0, 1]])
    assert {part_of(name) for name in together} == {"base", "merger", "vision", "token", "head"}
    assert_same_gradients(trained_gradients(model, sequences, [[0], [1]]), together, bound=1e-5)
    recomputing = make_model(gradient_checkpointing=True, **kind)
    assert_same_gradients(trained_gradients(recomputing, sequences, [[0, 1]]), together, bound=1e-5)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gradient_checkpointing": False}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True},
        pytest.param({"gradient_checkpointing": True, **BF16_EXPERTS}, marks=pytest.mark.slow),
    ],
    ids=["kept", "recomputed", "experts"],
)
def test_layers_compile_once_around_flash_attention_and_change_no_gradient(
    monkeypatch, make_model, sequences, settings
):
    """As on a GPU, except for the kernels and the compiler's backend; in two passes of different lengths."""
    monkeypatch.setattr(attention, "is_for_flash", lambda _: True)
    monkeypatch.setattr(attention, "choose_kernels", lambda _: PlainKernels)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for is_compiled in (False, True):
        model = make_model(**settings)
        if is_compiled:
            model.compile_layers()
        results.append(trained_gradients(model, sequences, [[1], [0]]))
    torch.compiler.reset()
    assert_same_gradients(*results, bound=0.2 if "dtype" in settings else 1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # all text layers, all vision blocks


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"base", "merger", "vision", "token", "head"}),
        ({"lora_enable": False}, {"base", "merger", "vision", "token", "head"}),
        ({"has_experts": True}, {"base", "merger", "vision", "token", "head"}),
        ({"freeze_llm": True}, {"merger", "vision", "token", "head"}),
        ({"freeze_vision_tower": True, "tune_merger": False}, {"base", "token", "head"}),
        ({"freeze_vision_tower": True, "vision_lora": True}, {"base", "merger", "vision", "token", "head"}),
    ],
)
def test_flags_choose_what_is_trained(make_model, settings, parts):
    model = make_model(**settings)
    trained = dict(model.trainable_parameters())
    assert {part_of(name) for name in trained} == parts
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert trained["reward_embedding"].shape == (model.rm_head.in_features,)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    uses_lora = settings.get("lora_enable", True) and not settings.get("freeze_llm")
    adapted = {name.split(".lora_")[0] for name in trained if ".language_model.layers." in name and ".lora_" in name}
    by_layer = 4 if settings.get("has_experts") else 7  # experts and their router have no adapters
    assert len(adapted) == (by_layer * len(model.text_layers) if uses_lora else 0)


@pytest.mark.parametrize(("tied", "spare_rows"), [(True, 0), (False, 8)])
def test_reward_token_never_shrinks_the_embedding(tmp_path, tied, spare_rows):
    base = write_small_base(tmp_path, tied=tied, spare_rows=spare_rows)
    processor = AutoProcessor.from_pretrained(base)
    rows = len(processor.tokenizer) + spare_rows
    token_id = add_reward_token(processor)
    model = build_reward_model(str(base), processor, RewardConfig(), dtype=torch.float32)
    assert model.qwen.get_input_embeddings().num_embeddings >= max(rows, token_id + 1)
    before = Qwen3VLForConditionalGeneration.from_pretrained(base).get_input_embeddings().weight
    kept = min(rows, token_id)
    assert torch.equal(model.qwen.get_input_embeddings().weight[:kept], before[:kept])


def test_other_model_families_are_refused(tmp_path):
    for model_type, reason in (
        ("llama", "of another family"),
        ("qwen3_5_moe", "linear attention"),
        ("qwen2_5_vl", "DeepStack"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=rf"is a '{model_type}' model, which is not supported: .*{reason}"):
            require_qwen3_vl(str(tmp_path))
    with pytest.raises(ValueError, match="not a model that transformers can load"):
        require_qwen3_vl(str(tmp_path / "nothing"))
