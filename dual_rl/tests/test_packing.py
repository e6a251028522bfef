"""The packed row: what stands where, and that everything finds its way back."""

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from model_support import Group, make_builder, make_group, small_checkpoint, write_small_model
from verl.core.packing import join_labels, pack_groups, split_labels
from verl.core.row_layout import SharedPromptLayout
from verl.data.scored_sequence import SequenceBuilder

MIXED = [[7, 0, -4], [12, -1], [5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def builder(folder) -> SequenceBuilder:
    return make_builder(small_checkpoint(folder))


@pytest.fixture(scope="module")
def groups(builder) -> list[Group]:
    return [make_group(builder, number, lengths) for number, lengths in enumerate(MIXED)]


def test_every_prompt_stands_once_followed_by_its_responses(builder, groups):
    packed = pack_groups(groups, builder)
    expected = []
    for prompt, responses in groups:
        expected += prompt.input_ids.tolist()
        for response in responses:
            expected += [*response.cot_ids, builder.reward_token_id]
    assert packed.input_ids.tolist() == expected
    assert packed.num_tokens == len(expected)
    assert packed.keys == tuple(response.key for _, responses in groups for response in responses)
    assert packed.video_keys == tuple(prompt.key for prompt, _ in groups)


def test_each_label_is_predicted_by_the_token_before_it(builder, groups):
    packed = pack_groups(groups, builder)
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


def test_positions_are_those_of_stock_transformers_for_each_sequence(folder, builder, groups):
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    packed = pack_groups(groups, builder)
    starts = iter(packed.layout.response_starts)
    for group_start, (prompt, responses) in zip(packed.layout.group_starts[:-1], groups, strict=True):
        length = prompt.input_ids.numel()
        for response in responses:
            ids = torch.tensor([[*prompt.input_ids.tolist(), *response.cot_ids, builder.reward_token_id]])
            expected, _ = stock.model.get_rope_index(
                ids,
                mm_token_type_ids=(ids == stock.config.video_token_id) * 2,
                video_grid_thw=torch.tensor([prompt.grid_thw]),
            )
            start = next(starts)
            found = [packed.position_ids[:, group_start:][:, :length], packed.position_ids[:, start:]]
            found[1] = found[1][:, : len(response.cot_ids) + 1]
            assert torch.equal(torch.cat(found, dim=1), expected[:, 0])


def test_labels_split_by_response_and_join_again(builder, groups):
    packed = pack_groups(groups, builder)
    values = torch.randn(len(packed.labels))
    pieces = split_labels(values, packed)
    assert [len(pieces[key]) for key in packed.keys] == list(packed.num_labels)
    assert torch.equal(join_labels(pieces, packed), values)

    other_order = pack_groups(groups[::-1], builder)
    again = split_labels(join_labels(pieces, other_order), other_order)
    assert all(torch.equal(again[key], pieces[key]) for key in packed.keys)
    with pytest.raises(AssertionError, match="one value per label"):
        join_labels({**pieces, packed.keys[0]: values[:1]}, packed)


def test_video_tokens_are_found_in_order(builder, groups):
    packed = pack_groups(groups, builder)
    assert torch.equal(packed.video_positions, (packed.input_ids == builder.processor.video_token_id).nonzero()[:, 0])
    assert packed.grid_thw == tuple(prompt.grid_thw for prompt, _ in groups)


def test_layout_of_the_documented_example():
    layout = SharedPromptLayout((3,), ((2, 1),))
    assert layout.segment_bounds.tolist() == [0, 3, 5, 6]
    assert layout.response_starts == (3, 5)
    (group,) = layout.groups
    assert (group.prompt, group.responses) == (slice(0, 3), slice(3, 6))
    source, place = layout.unrolled
    assert source.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert place.tolist() == [0, 1, 2, 3, 4, 8]


def test_unrolled_layout_finds_every_token():
    layout = SharedPromptLayout((3, 1, 4), ((2, 1), (5,), (1, 1, 3)))
    source, place = layout.unrolled
    assert source.flatten()[place].tolist() == list(range(layout.group_starts[-1]))
    assert [group.lengths for group in layout.groups] == [(3, 3), (5, 1), (5, 4)]
    assert [[bounds.tolist() for bounds in group.bounds] for group in layout.groups][1] == [[0, 5], [0, 1]]
    tokens = [part for group in layout.groups for part in (group.prompt, group.responses)]
    assert [token for part in tokens for token in range(21)[part]] == list(range(21))
