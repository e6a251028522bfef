"""The scored sequence, video sampling and packing."""

import pytest
import torch

from scored_sequence import REWARD_TOKEN, judge_problem
from stage1_support import SMALL_BUDGET
from vision_process import VideoBudget, VideoError, load_video, probe_video, sampled_indices


def test_sequence_is_prompt_cot_reward_eos(builder, clips):
    prompt = builder.encode_prompt(judge_problem("a red circle"), load_video(clips[0], SMALL_BUDGET))
    assert builder.tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")
    closing = [builder.reward_token_id, builder.tokenizer.eos_token_id]
    for cot_ids in (builder.encode_cot("it moves left"), []):  # no CoT: it is masked
        sequence = builder.build(prompt, cot_ids)
        assert sequence.input_ids.tolist() == [*prompt.input_ids.tolist(), *cot_ids, *closing]
        assert sequence.reward_position == prompt.input_ids.numel() + len(cot_ids)


@pytest.mark.parametrize(
    ("problem", "before", "after"),
    [("look: <video> done?", "look: ", " done?"), ("no placeholder", "", "no placeholder")],
)
def test_problem_is_split_at_the_video_and_a_missing_one_comes_first(builder, problem, before, after):
    user = builder.render(problem).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert user == f"{before}<|vision_start|><|video_pad|><|vision_end|>{after}"


def test_reserved_texts_are_errors(builder):
    for text in ("two <video> and <video>", f"a literal {REWARD_TOKEN}", "a <|video_pad|>"):
        with pytest.raises(ValueError, match="problem contains"):
            builder.render(text)
    for text in (f"so {REWARD_TOKEN} it is", "the end<|im_end|>", "<|vision_start|>"):
        with pytest.raises(ValueError, match="CoT contains the reserved token"):
            builder.encode_cot(text)


def test_frames_follow_the_budget_and_lengths_are_known_without_decoding(builder, clips):
    problem = judge_problem("a blue star that moves left")
    for clip in clips:
        header, video = probe_video(clip), load_video(clip, SMALL_BUDGET)
        num_frames, _, height, width = video.frames.shape
        assert video.frames.dtype == torch.uint8
        assert video.frame_indices == sampled_indices(header, SMALL_BUDGET)
        assert num_frames == len(video.frame_indices) >= SMALL_BUDGET.min_frames
        assert (num_frames % 2, height % 32, width % 32) == (0, 0, 0)
        assert height * width <= SMALL_BUDGET.max_pixels
        assert (video.frame_indices[0], video.frame_indices[-1]) == (0, video.total_frames - 1)
        length = builder.encode_prompt(problem, video).input_ids.numel()
        assert builder.count_prompt_tokens(problem, header, SMALL_BUDGET) == length


def test_too_few_frames_and_impossible_budgets_are_errors(clips):
    with pytest.raises(VideoError, match="at least 500 are needed"):
        load_video(clips[0], VideoBudget(min_frames=500, max_frames=600))
    with pytest.raises(ValueError, match="fps must be positive"):
        VideoBudget(fps=0)
    with pytest.raises(ValueError, match="min_pixels"):
        VideoBudget(min_pixels=10, max_pixels=5)
