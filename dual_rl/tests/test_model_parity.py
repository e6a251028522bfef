"""The packed forward against the slow path in fp32: log-probs, entropy, rewards, gradients of all parameters."""

from collections.abc import Sequence

import pytest
import torch

from model_support import Group, make_builder, make_group, make_policy, pixels_of, small_checkpoint, write_small_model
from slow_path import compute_separately
from update_support import largest_error, relative_error
from verl.core.objective import PolicyOutput
from verl.core.packing import pack_groups
from verl.data.scored_sequence import SequenceBuilder
from verl.model.policy import PolicyModel

TEMPERATURE = 0.8
LENGTHS = [[9, 0, -6], [14, -1], [5]]
"""Of the responses to each video, which differ in size; some are empty, cut, or cut without a label."""
BOUND = 1e-5  # relative, of each output and of each parameter's gradient; measured: up to 1e-6


def run_packed(model: PolicyModel, groups: Sequence[Group], builder: SequenceBuilder) -> PolicyOutput:
    packed = pack_groups(groups, builder)
    return model(packed, None, pixels_of(groups, builder), temperature=TEMPERATURE)


def gradients(model: PolicyModel, output: PolicyOutput) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every log-prob and every reward differently."""
    factors = torch.linspace(-1, 2, len(output.log_probs))
    loss = (factors * output.log_probs).sum() + (output.rewards * torch.arange(len(output.rewards))).sum()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize(
    ("settings", "is_tied", "has_checkpointing", "trained"),
    [
        ({}, True, False, "embed_tokens layers reward_embedding rm_head"),
        ({"freeze_vision_tower": False}, False, True, "embed_tokens layers lm_head reward_embedding rm_head visual"),
        ({"lora_rank": 4}, False, True, "lora_ reward_embedding rm_head"),
    ],
    ids=["full_tied", "tuned_vision", "lora"],
)
def test_packed_forward_and_gradients_equal_separate_sequences(
    tmp_path, small_model, settings, is_tied, has_checkpointing, trained
):
    checkpoint = small_checkpoint(write_small_model(tmp_path, tied=True) if is_tied else small_model)
    builder = make_builder(checkpoint)
    groups = [make_group(builder, number, lengths) for number, lengths in enumerate(LENGTHS)]
    model = make_policy(checkpoint, gradient_checkpointing=has_checkpointing, **settings)
    slow = make_policy(checkpoint, **settings)
    found = run_packed(model, groups, builder)
    expected, _ = compute_separately(slow, groups, builder, temperature=TEMPERATURE)
    for name in ("log_probs", "entropy", "rewards"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < BOUND
        assert getattr(expected, name).std() > 0.05  # inputs must show in outputs, or the comparison says nothing
    grads = gradients(model, found)
    assert largest_error(grads, gradients(slow, expected)) < BOUND
    assert {part_of(name) for name in grads} == set(trained.split())


def part_of(name: str) -> str:
    parts = ("lora_", "visual", "layers", "embed_tokens", "lm_head", "reward_embedding", "rm_head")
    return next((part for part in parts if part in name), "layers")
