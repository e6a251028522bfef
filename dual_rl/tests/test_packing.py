"""The packed row: what it holds and where, and that everything finds its way back."""

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from model_support import Group, make_builder, make_group, small_checkpoint
from verl.core.packing import PackedGroups, SharedPromptLayout, join_labels, pack_groups, split_labels
from verl.data.scored_sequence import SequenceBuilder

MIXED = [[7, 0, -4], [12, -1], [5]]


@pytest.fixture(scope="module")
def builder(small_model) -> SequenceBuilder:
    return make_builder(small_checkpoint(small_model))


@pytest.fixture(scope="module")
def groups(builder) -> list[Group]:
    return [make_group(builder, number, lengths) for number, lengths in enumerate(MIXED)]


@pytest.fixture(scope="module")
def packed(builder, groups) -> PackedGroups:
    return pack_groups(groups, builder)


def test_every_prompt_is_packed_once_followed_by_its_responses(builder, groups, packed):
    expected = []
    for prompt, responses in groups:
        expected += prompt.input_ids.tolist()
        for response in responses:
            expected += [*response.cot_ids, builder.reward_token_id]
    assert packed.input_ids.tolist() == expected
    assert packed.num_tokens == packed.layout.num_tokens == len(expected)
    assert packed.keys == tuple(response.key for _, responses in groups for response in responses)
    assert packed.video_keys == tuple(prompt.key for prompt, _ in groups)
    assert packed.grid_thw == tuple(prompt.grid_thw for prompt, _ in groups)
    assert torch.equal(packed.video_positions, (packed.input_ids == builder.processor.video_token_id).nonzero()[:, 0])


def test_each_label_is_predicted_by_the_token_before_it(builder, groups, packed):
    eos = builder.tokenizer.eos_token_id
    responses = [(prompt, response) for prompt, group in groups for response in group]
    for index, (prompt, response) in enumerate(responses):
        mine = packed.label_owner == index
        assert packed.labels[mine].tolist() == [*response.cot_ids, *([eos] if response.is_finished else [])]
        read = [prompt.input_ids[-1].item(), *response.cot_ids][: response.num_labels]
        assert packed.input_ids[packed.label_positions[mine]].tolist() == read
        assert packed.input_ids[packed.reward_positions[index]] == builder.reward_token_id
    assert packed.num_labels == tuple(response.num_labels for _, response in responses)
    assert len(packed.labels) == sum(packed.num_labels)


def test_positions_are_those_of_stock_transformers_for_each_sequence(small_model, builder, groups, packed):
    stock = Qwen3VLForConditionalGeneration.from_pretrained(small_model)
    sequences = [(prompt, response) for prompt, responses in groups for response in responses]
    for tokens, (prompt, response) in zip(packed.layout.unrolled[0], sequences, strict=True):
        ids = torch.tensor([[*prompt.input_ids.tolist(), *response.cot_ids, builder.reward_token_id]])
        tokens = tokens[: ids.shape[1]]
        assert torch.equal(packed.input_ids[tokens], ids[0])
        is_video = ids == stock.config.video_token_id
        grid = torch.tensor([prompt.grid_thw])
        expected, _ = stock.model.get_rope_index(ids, mm_token_type_ids=is_video * 2, video_grid_thw=grid)
        assert torch.equal(packed.position_ids[:, tokens], expected[:, 0])


def test_labels_split_by_response_and_join_again(builder, groups, packed):
    values = torch.randn(len(packed.labels))
    pieces = split_labels(values, packed)
    assert [len(pieces[key]) for key in packed.keys] == list(packed.num_labels)
    assert torch.equal(join_labels(pieces, packed), values)

    other_order = pack_groups(groups[::-1], builder)
    again = split_labels(join_labels(pieces, other_order), other_order)
    assert all(torch.equal(again[key], pieces[key]) for key in packed.keys)
    with pytest.raises(AssertionError, match="one value per label"):
        join_labels({**pieces, packed.keys[0]: values[:1]}, packed)


def test_layout_of_the_documented_example_and_of_several_groups():
    layout = SharedPromptLayout((3,), ((2, 1),))
    assert layout.segment_bounds.tolist() == [0, 3, 5, 6]
    (group,) = layout.groups
    assert (group.prompt, group.responses) == (slice(0, 3), slice(3, 6))
    source, index = layout.unrolled
    assert source.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert index.tolist() == [0, 1, 2, 3, 4, 8]

    layout = SharedPromptLayout((3, 1, 4), ((2, 1), (5,), (1, 1, 3)))
    source, index = layout.unrolled
    assert source.flatten()[index].tolist() == list(range(21))
    assert [group.lengths for group in layout.groups] == [(3, 3), (5, 1), (5, 4)]
    assert [bounds.tolist() for bounds in layout.groups[1].bounds] == [[0, 5], [0, 1]]
    spans = [span for group in layout.groups for span in (group.prompt, group.responses)]
    assert [token for span in spans for token in range(21)[span]] == list(range(21))
