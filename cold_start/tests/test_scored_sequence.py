"""The scored sequence, video sampling and packing."""

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from scored_sequence import REWARD_TOKEN, SequenceBuilder, judge_problem, pack_sequences
from stage1_support import REAL_VIDEOS, SMALL_BUDGET
from vision_process import VideoBudget, VideoError, load_video, num_sampled_frames, probe_video


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


def test_format_prompt_wraps_the_problem_or_is_an_error(builder):
    wrapped = SequenceBuilder(builder.processor, format_prompt="{{ content | trim }} Think well.")
    assert "what is it? Think well.<|im_end|>" in wrapped.render("<video> what is it? ")
    for template in ("{{ contents }}", "{% if %}"):
        with pytest.raises(ValueError, match="does not render"):
            SequenceBuilder(builder.processor, format_prompt=template)


def test_reserved_texts_are_errors(builder):
    for text in ("two <video> and <video>", f"a literal {REWARD_TOKEN}", "a <|video_pad|>"):
        with pytest.raises(ValueError, match="problem contains"):
            builder.render(text)
    for text in (f"so {REWARD_TOKEN} it is", "the end<|im_end|>", "<|vision_start|>"):
        with pytest.raises(ValueError, match="CoT contains the reserved token"):
            builder.encode_cot(text)


def test_positions_equal_those_of_transformers(small_base, sequences):
    stock = Qwen3VLForConditionalGeneration.from_pretrained(small_base)
    for sequence in sequences:
        ids = sequence.input_ids.unsqueeze(0)
        types = (ids == stock.config.video_token_id).int() * 2
        grid = torch.tensor([sequence.grid_thw])
        expected, _ = stock.model.get_rope_index(ids, mm_token_type_ids=types, video_grid_thw=grid)
        assert torch.equal(sequence.position_ids, expected[:, 0])


def test_packing_keeps_every_sequence(sequences):
    packed = pack_sequences(sequences)
    bounds = packed.cu_seq_lens.tolist()
    for i, sequence in enumerate(sequences):
        assert torch.equal(packed.input_ids[bounds[i] : bounds[i + 1]], sequence.input_ids)
        assert torch.equal(packed.position_ids[:, bounds[i] : bounds[i + 1]], sequence.position_ids)
        assert packed.reward_positions[i] == bounds[i] + sequence.reward_position
    assert packed.max_seq_len == max(sequence.input_ids.numel() for sequence in sequences)
    assert packed.pixel_values.shape[0] == packed.video_grid_thw.prod(dim=1).sum()


def test_frames_follow_the_budget_and_lengths_are_known_without_decoding(builder, clips):
    problem = judge_problem("a blue star that moves left")
    for clip in clips:
        header, video = probe_video(clip), load_video(clip, SMALL_BUDGET)
        num_frames, _, height, width = video.frames.shape
        assert video.frames.dtype == torch.uint8
        assert num_frames == num_sampled_frames(header, SMALL_BUDGET) >= SMALL_BUDGET.min_frames
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


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real clips at {REAL_VIDEOS}")
def test_real_clips_fit_the_default_budget(builder):
    budget = VideoBudget()
    for name, source_fps in (("example_1_A.mp4", 24.0), ("example_1_B.mp4", 30.0)):
        video = load_video(REAL_VIDEOS / name, budget)
        assert video.source_fps == pytest.approx(source_fps)
        assert video.frames.shape[0] == 10
        assert video.frames.shape[-1] * video.frames.shape[-2] <= budget.max_pixels
        length = builder.count_prompt_tokens("what is it?", probe_video(REAL_VIDEOS / name), budget)
        assert length == builder.encode_prompt("what is it?", video).input_ids.numel()
