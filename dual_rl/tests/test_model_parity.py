"""The packed forward against the slow path in fp32: log-probs, entropy, rewards, gradients of all parameters."""

from collections.abc import Sequence

import pytest
import torch
from transformers import AttentionInterface

from model_support import Group, make_builder, make_group, make_policy, pixels_of, small_checkpoint, write_small_model
from slow_path import compute_log_distributions, compute_separately
from verl.core.objective import PolicyOutput
from verl.core.packing import pack_groups, split_labels
from verl.data.scored_sequence import SequenceBuilder
from verl.model.attention import SHARED_PROMPT_ATTENTION, shared_prompt_attention
from verl.model.policy import PolicyModel, VisionFeatures
from verl.model.reward_files import PolicyCheckpoint

TEMPERATURE = 0.8
BOUND = 1e-5  # relative, of each output and of each parameter's gradient; measured: up to 1e-6


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def any_checkpoint(request, tmp_path_factory) -> PolicyCheckpoint:
    return small_checkpoint(write_small_model(tmp_path_factory.mktemp("model"), tied=request.param))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> PolicyCheckpoint:
    return small_checkpoint(write_small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def builder(checkpoint) -> SequenceBuilder:
    return make_builder(checkpoint)


@pytest.fixture(scope="module")
def groups(builder) -> list[Group]:
    """Videos of different sizes; responses of different lengths, empty, cut, and cut without a label."""
    return [make_group(builder, number, lengths) for number, lengths in enumerate([[9, 0, -6], [14, -1], [5]])]


def run_packed(model: PolicyModel, groups: Sequence[Group], builder: SequenceBuilder, **options) -> PolicyOutput:
    packed = pack_groups(groups, builder)
    return model(packed, None, pixels_of(groups, builder), temperature=TEMPERATURE, **options)


def gradients(model: PolicyModel, output: PolicyOutput) -> dict[str, torch.Tensor | None]:
    """Of a loss that weighs every log-prob and every reward differently."""
    factors = torch.linspace(-1, 2, len(output.log_probs))
    loss = (factors * output.log_probs).sum() + (output.rewards * torch.arange(len(output.rewards))).sum()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert all(gradient is not None for gradient in (*found.values(), *expected.values()))
    return max(relative_error(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("settings", "num_trained_parts"),
    [({}, 5), ({"freeze_vision_tower": False}, 6), ({"lora_rank": 4}, 3)],
    ids=["full", "tuned_vision", "lora"],
)
def test_packed_forward_and_gradients_equal_separate_sequences(
    any_checkpoint, settings, num_trained_parts, gradient_checkpointing
):
    builder = make_builder(any_checkpoint)
    groups = [make_group(builder, number, lengths) for number, lengths in enumerate([[9, 0, -6], [14, -1], [5]])]
    model = make_policy(any_checkpoint, gradient_checkpointing=gradient_checkpointing, **settings)
    slow = make_policy(any_checkpoint, **settings)
    found = run_packed(model, groups, builder)
    expected = compute_separately(slow, groups, builder, temperature=TEMPERATURE)
    for name in ("log_probs", "entropy", "rewards"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < BOUND
        assert getattr(expected, name).std() > 0.05  # inputs must show in outputs, or the comparison says nothing
    grads = gradients(model, found)
    assert largest_error(grads, gradients(slow, expected)) < BOUND
    is_tied = any_checkpoint.config.tie_word_embeddings and not settings.get("lora_rank")
    assert len({part_of(name) for name in grads}) == num_trained_parts - is_tied


def part_of(name: str) -> str:
    for part in ("lora_", "visual", "layers", "embed_tokens", "lm_head", "language_model.norm"):
        if part in name:
            return part.replace("language_model.norm", "layers")
    return name


@pytest.mark.parametrize("settings", [{}, {"freeze_vision_tower": False}], ids=["full", "tuned_vision"])
def test_gradients_do_not_depend_on_what_shares_a_row(checkpoint, builder, groups, settings):
    model = make_policy(checkpoint, **settings)
    together = run_packed(model, groups, builder)
    alone = [run_packed(model, [group], builder) for group in groups[::-1]]
    found = split_labels(together.log_probs, pack_groups(groups, builder))
    for group, output in zip(groups[::-1], alone, strict=True):
        for key, log_probs in split_labels(output.log_probs, pack_groups([group], builder)).items():
            torch.testing.assert_close(found[key], log_probs, rtol=BOUND, atol=1e-6)
    joined = PolicyOutput(
        torch.cat([output.rewards for output in alone[::-1]]), torch.cat([output.log_probs for output in alone[::-1]])
    )
    assert largest_error(gradients(model, together), gradients(model, joined)) < BOUND


def test_cached_vision_features_equal_recomputed_ones(checkpoint, builder, groups):
    model = make_policy(checkpoint)
    with torch.no_grad():
        grid = torch.tensor([prompt.grid_thw for prompt, _ in groups[::-1]])
        features = model.encode_videos(pixels_of(groups[::-1], builder), grid).split()
    cached = VisionFeatures.concatenate(features[::-1])
    assert not cached.embeddings.requires_grad
    outputs = [
        run_packed(model, groups, builder),
        model(pack_groups(groups, builder), cached, temperature=TEMPERATURE),
    ]
    for ours, theirs in zip(*(output[:3] for output in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert largest_error(*(gradients(model, output) for output in outputs)) < BOUND


def test_tuned_vision_tower_gets_its_gradient_only_when_it_is_trained(checkpoint, builder, groups):
    for is_frozen in (True, False):
        model = make_policy(checkpoint, freeze_vision_tower=is_frozen)
        grid = torch.tensor([prompt.grid_thw for prompt, _ in groups])
        assert model.encode_videos(pixels_of(groups, builder), grid).embeddings.requires_grad != is_frozen


def test_adapter_disabled_is_the_model_before_lora(checkpoint, builder, groups):
    plain, adapted = make_policy(checkpoint), make_policy(checkpoint, lora_rank=4)
    with torch.no_grad():
        expected = run_packed(plain, groups, builder)
        with adapted.adapter_disabled():
            found = run_packed(adapted, groups, builder)
        changed = run_packed(adapted, groups, builder)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.rewards, expected.rewards)
    assert (changed.log_probs - expected.log_probs).abs().max() > 0.1
    assert all(p.requires_grad == ("lora_" in n) for n, p in adapted.backbone.named_parameters())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_full_kl_equals_the_sum_over_the_vocabulary(checkpoint, builder, groups, lora_rank):
    model = make_policy(checkpoint, lora_rank=lora_rank)
    reference = make_policy(checkpoint)
    with torch.no_grad():
        if lora_rank:
            with model.adapter_disabled():
                distributions = run_packed(model, groups, builder, return_distributions=True).distributions
            assert distributions.head_weight is None
        else:
            for parameter in model.backbone.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            distributions = run_packed(reference, groups, builder, return_distributions=True).distributions
    found = run_packed(model, groups, builder, ref_distributions=distributions).full_kl
    expected = []
    for prompt, responses in groups:
        for response in responses:
            arguments = (prompt, response, builder)
            ours = compute_log_distributions(model, *arguments, temperature=TEMPERATURE)
            theirs = compute_log_distributions(reference, *arguments, temperature=TEMPERATURE).detach()
            difference = torch.where(ours.isinf(), 0.0, ours - theirs)
            expected.append((ours.exp() * difference).sum(dim=1))
    expected = torch.cat(expected)
    assert relative_error(found, expected) < 1e-4
    assert expected.mean() > 1e-3
    parameters = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    grads = [torch.autograd.grad(kl.sum(), parameters) for kl in (found, expected)]
    assert max(relative_error(*pair) for pair in zip(*grads, strict=True)) < 1e-4


def test_rewards_alone_need_no_temperature(checkpoint, builder, groups):
    model = make_policy(checkpoint)
    packed, pixels = pack_groups(groups, builder), pixels_of(groups, builder)
    with torch.no_grad():
        alone, full = (model(packed, None, pixels, temperature=temperature) for temperature in (None, 1.0))
    assert torch.equal(alone.rewards, full.rewards)
    assert alone.log_probs is None


def test_what_is_trained_follows_the_settings(checkpoint):
    frozen = {name for name, parameter in make_policy(checkpoint).named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(".visual." in name for name in frozen)
    lora = {
        name for name, parameter in make_policy(checkpoint, lora_rank=4).named_parameters() if parameter.requires_grad
    }
    layers = checkpoint.config.text_config.num_hidden_layers
    assert len(lora) == 2 * 7 * layers + 2
    assert {"reward_embedding", "rm_head.weight"} < lora


@pytest.fixture
def compiled_attention(compiling):
    """Attention as compiled layers call it is registered for the whole process: put back afterwards."""
    yield
    AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("compiled_attention")
def test_compiled_layers_change_nothing(checkpoint, builder, groups, checkpointing):
    settings = {"lora_rank": 4, "gradient_checkpointing": checkpointing}
    plain, compiled = make_policy(checkpoint, **settings), make_policy(checkpoint, **settings)
    compiled.compile_layers()
    expected, found = run_packed(plain, groups, builder), run_packed(compiled, groups, builder)
    for name in ("rewards", "log_probs", "entropy"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < BOUND
    assert largest_error(gradients(compiled, found), gradients(plain, expected)) < BOUND
    shorter = groups[1:]  # another length, without a gradient, and as the reference
    with torch.no_grad(), plain.adapter_disabled(), compiled.adapter_disabled():
        expected, found = run_packed(plain, shorter, builder), run_packed(compiled, shorter, builder)
    assert relative_error(found.log_probs, expected.log_probs) < BOUND
