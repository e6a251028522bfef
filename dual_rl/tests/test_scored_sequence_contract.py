"""Stage 1 and stage 2 build the same sequence: pixels, token ids and positions; and they refuse the same texts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

import scored_sequence as stage1
import vision_process as stage1_vision
from model_support import TINY_BASE
from verl.core.packing import pack_groups
from verl.data import scored_sequence as stage2
from verl.data import vision_process as stage2_vision
from verl.types import Response, ResponseKey, VideoKey

CLIPS = sorted((Path(stage1.__file__).parent / "datasets" / "train" / "videos").glob("*.mp4"))
BUDGETS = [{"max_frames": 8, "min_pixels": 64 * 64, "max_pixels": 64 * 96}, {}]
KEY = VideoKey(0, "A")
TEMPLATE = "{{ content | trim }} Think well."


@pytest.fixture(scope="module")
def processor():
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    processor.tokenizer.add_tokens([stage2.REWARD_TOKEN], special_tokens=True)
    return processor


@pytest.fixture(scope="module")
def builders(processor):
    return stage1.SequenceBuilder(processor, format_prompt=TEMPLATE), stage2.SequenceBuilder(
        processor, format_prompt=TEMPLATE
    )


@pytest.mark.parametrize(("clip", "budget"), [*zip(CLIPS[:2], BUDGETS, strict=True)], ids=["small", "default"])
def test_frames_ids_pixels_and_positions_are_those_of_stage_1(builders, clip, budget):
    ours, theirs = (vision.load_video(clip, vision.VideoBudget(**budget)) for vision in (stage2_vision, stage1_vision))
    assert torch.equal(ours.frames, theirs.frames)
    assert ours.metadata == theirs.metadata
    problem = stage2.judge_problem("a red circle")
    assert problem == stage1.judge_problem("a red circle")
    prompt = builders[1].encode_prompt(KEY, problem, ours)
    expected = builders[0].encode_prompt(problem, theirs)
    assert torch.equal(prompt.input_ids, expected.input_ids)
    assert torch.equal(builders[1].pixel_values(prompt), expected.pixel_values)
    assert prompt.grid_thw == expected.grid_thw

    cot = builders[0].encode_cot("it moves left")
    sequence = builders[0].build(expected, cot)
    response = Response(ResponseKey(*KEY, 0), tuple(cot), True, torch.zeros(len(cot) + 1))
    packed = pack_groups([(prompt, [response])], builders[1])
    assert packed.input_ids.tolist() == sequence.input_ids[:-1].tolist()  # EOS is a label, not a token of the row
    assert torch.equal(packed.position_ids, sequence.position_ids[:, :-1])
    assert packed.reward_positions.tolist() == [sequence.reward_position]
    assert packed.labels.tolist() == [*cot, sequence.input_ids[-1]]


@pytest.mark.parametrize("text", ["two <video> and <video>", "a literal <Reward>", "a <|video_pad|>", "<|im_end|>"])
def test_reserved_texts_are_errors_in_both_stages(builders, text):
    messages = []
    assert builders[0].render("look: <video> done?") == builders[1].render("look: <video> done?")
    for builder in builders:
        with pytest.raises(ValueError, match="contains") as caught:
            builder.render(text)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_forbidden_tokens_are_reward_vision_padding_and_rows_without_a_token(processor):
    tokenizer = processor.tokenizer
    forbidden = stage2.forbidden_token_ids(processor, len(tokenizer) + 3)
    named = {tokenizer.convert_ids_to_tokens(i) for i in forbidden if i < len(tokenizer)}
    vision = {"<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"}
    assert named == vision | {stage2.REWARD_TOKEN, tokenizer.pad_token}
    assert [i for i in forbidden if i >= len(tokenizer)] == [len(tokenizer) + extra for extra in range(3)]
    assert tokenizer.eos_token_id not in forbidden
