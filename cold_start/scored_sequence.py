"""The scored sequence: one definition for training, evaluation and scoring.

    user:       <text before "<video>">  <video frames>  <text after "<video>">
    assistant:  CoT  <Reward>  <EOS>

The reward is read at `<Reward>`. The CoT is in the assistant turn as token ids, exactly as it was generated; with the
CoT masked, `<Reward>` follows the generation prompt directly. A batch packs its sequences one after the other into one
row, each with its own positions, without padding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.video_utils import VideoMetadata

from descore.checked import digest
from descore.format_prompt import FormatPrompt
from vision_process import VideoBudget, VideoFrames, VideoHeader, budgeted_size, sampled_indices

REWARD_TOKEN = "<Reward>"
VIDEO_PLACEHOLDER = "<video>"
NUM_CLOSING_TOKENS = 2  # <Reward> and EOS
DEFAULT_FORMAT_PROMPT = "{{ content | trim }}"

JUDGE_PROMPT = """\
<video>
You are judging a video that was generated from this text prompt:
{prompt}

Compare what the video shows with what the prompt asks for, one dimension at a time:
- subject: who or what appears, how many, and how they look
- dynamics: what they do and how they move
- camera: where the camera stands and how it moves
- environment: the place, the background and the light
- style: the look and the way of rendering
Score each dimension 2 (as asked), 1 (partly), 0 (not at all), or "N/A" if the prompt says nothing about it.
Then give an overall score from 1.00 (worst) to 5.00 (best).
Think first, then end with JSON in exactly this form:
<answer>
{{"dimensional_scores": {{"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 2, "style": 0}}, \
"overall_score": 3.50}}
</answer>"""


def judge_problem(prompt: str) -> str:
    """The built-in judge prompt for a text-to-video prompt: what a CSV without `problem` gets."""
    return JUDGE_PROMPT.format(prompt=prompt.strip())


@dataclass(frozen=True)
class EncodedPrompt:
    """The user turn and the generation prompt of one (problem, video), tokenised and with its video preprocessed.

    `input_ids`: int64 [prompt_length]. `pixel_values`: float32 [num_patches, patch_dim]. `grid_thw`: patches along
    time (two frames each), height and width, so that num_patches = t * h * w.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class ScoredSequence:
    """One sequence `prompt, CoT, <Reward>, <EOS>`.

    `input_ids`: int64 [length]. `position_ids`: int64 [3, length], M-RoPE positions (time, height, width).
    `video_positions`: int64, indices of the video tokens. `reward_position`: index of `<Reward>` in the sequence
    (length - 2). The others as in EncodedPrompt.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    video_positions: torch.Tensor
    reward_position: int
    pixel_values: torch.Tensor
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class PackedSequences:
    """Sequences one after the other in a single row, without padding.

    Shapes, for N sequences of total length T: `input_ids` int64 [T]; `position_ids` int64 [3, T]; `cu_seq_lens` int32
    [N + 1], sequence i covers cu_seq_lens[i] : cu_seq_lens[i + 1]; `max_seq_len` the longest; `video_positions` int64,
    indices of all video tokens in the row; `reward_positions` int64 [N], indices into the row; `pixel_values` float32
    [all patches, patch_dim]; `video_grid_thw` int64 [N, 3].

    Example: lengths 5 and 7 give T = 12, cu_seq_lens [0, 5, 12], reward_positions [3, 10].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_seq_len: int
    video_positions: torch.Tensor
    reward_positions: torch.Tensor
    pixel_values: torch.Tensor
    video_grid_thw: torch.Tensor

    @property
    def num_sequences(self) -> int:
        return self.reward_positions.numel()

    def to(self, device: torch.device | str) -> "PackedSequences":
        """A copy on `device`; `video_grid_thw` stays on the CPU, where its values are read."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedSequences":
        """A copy in page-locked memory, from which `to` copies asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedSequences":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        del tensors["video_grid_thw"]
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


class SequenceBuilder:
    """Builds scored sequences with a checkpoint's own processor and chat template.

    `processor`: a Qwen3-VL processor whose tokenizer knows `<Reward>`. `format_prompt`: a Jinja template with the
    variable `content` that wraps the problem. Raises ValueError when `<Reward>` is not one token or the
    template does not render.
    """

    def __init__(self, processor, *, format_prompt: str = DEFAULT_FORMAT_PROMPT) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.format_prompt = FormatPrompt(format_prompt)
        self.reward_token_id = reward_token_id(self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the number of tokens of a text and a video header depends on."""
        frames = (self.size_factor, self.processor.video_processor.temporal_patch_size)
        tokenizer = self.tokenizer.backend_tokenizer.to_str()
        return digest(tokenizer, self.processor.chat_template, self.format_prompt.text, frames)

    @cached_property
    def _reserved_texts(self) -> tuple[str, ...]:
        vision = (self.processor.video_token, self.processor.image_token, self.processor.vision_start_token)
        return tuple(dict.fromkeys((REWARD_TOKEN, *vision, *self.tokenizer.all_special_tokens)))

    @property
    def size_factor(self) -> int:
        """Frame sides are multiples of this many pixels."""
        return self.processor.video_processor.patch_size * self.processor.video_processor.merge_size

    def check_text(self, text: str, what: str) -> None:
        """Raise ValueError when `text` contains a reserved token; `what` names it in the message."""
        for reserved in self._reserved_texts:
            if reserved in text:
                raise ValueError(f"{what} contains the reserved token {reserved!r}; remove it")

    def user_blocks(self, problem: str) -> list[dict[str, str]]:
        """The user turn: one block `{"type": "video"}`, and `{"type": "text", "text": ...}` before and after it."""
        content = self.format_prompt.render(problem)
        self.check_text(content, "problem")
        parts = content.split(VIDEO_PLACEHOLDER)
        if len(parts) > 2:
            raise ValueError(f"problem contains {VIDEO_PLACEHOLDER!r} {len(parts) - 1} times; once is allowed")
        before, after = parts if len(parts) == 2 else ("", parts[0])
        blocks = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": after}]
        return [block for block in blocks if block.get("text") != ""]

    def render(self, problem: str) -> str:
        """The chat text of the user turn with one video placeholder token, ending in the generation prompt."""
        messages = [{"role": "user", "content": self.user_blocks(problem)}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode_prompt(self, problem: str, video: VideoFrames) -> EncodedPrompt:
        """Tokenise the user turn and preprocess its frames (already sampled and resized)."""
        inputs = self.processor(
            text=[self.render(problem)],
            videos=[video.frames],
            video_metadata=[video.metadata],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
        return EncodedPrompt(
            input_ids=inputs["input_ids"][0],
            pixel_values=inputs["pixel_values_videos"],
            grid_thw=tuple(inputs["video_grid_thw"][0].tolist()),
        )

    def count_prompt_tokens(self, problem: str, header: VideoHeader, budget: VideoBudget) -> int:
        """Length of `encode_prompt(...).input_ids` for a clip with this header, without decoding it."""
        video_processor, indices = self.processor.video_processor, sampled_indices(header, budget)
        height, width = budgeted_size(header.height, header.width, budget, size_factor=self.size_factor)
        patch_size, frames_per_group = video_processor.patch_size, video_processor.temporal_patch_size
        grid_thw = torch.tensor([[len(indices) // frames_per_group, height // patch_size, width // patch_size]])
        metadata = VideoMetadata(total_num_frames=header.total_frames, fps=header.fps, frames_indices=list(indices))
        placeholder = self.processor.replace_video_token({"video_grid_thw": grid_thw, "video_metadata": [metadata]}, 0)
        text = self.render(problem).replace(self.processor.video_token, placeholder, 1)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_cot(self, cot: str) -> list[int]:
        """Token ids of a CoT given as text. Raises ValueError when it contains a reserved token."""
        self.check_text(cot, "CoT")
        return self.tokenizer(cot, add_special_tokens=False)["input_ids"]

    def build(self, prompt: EncodedPrompt, cot_ids: Sequence[int] = ()) -> ScoredSequence:
        """Append CoT ids (none: masked), `<Reward>` and EOS to an encoded prompt."""
        tail = torch.tensor([*cot_ids, self.reward_token_id, self.tokenizer.eos_token_id], dtype=torch.long)
        input_ids = torch.cat([prompt.input_ids, tail])
        num_reward_tokens = int((input_ids == self.reward_token_id).sum())
        if num_reward_tokens != 1:
            raise ValueError(f"{REWARD_TOKEN!r} must occur exactly once in a sequence, found {num_reward_tokens}")
        return ScoredSequence(
            input_ids=input_ids,
            video_positions=(input_ids == self.processor.video_token_id).nonzero().squeeze(1),
            position_ids=compute_mrope_positions(
                input_ids,
                video_token_id=self.processor.video_token_id,
                grid_thw=prompt.grid_thw,
                merge_size=self.processor.video_processor.merge_size,
            ),
            reward_position=input_ids.numel() - NUM_CLOSING_TOKENS,
            pixel_values=prompt.pixel_values,
            grid_thw=prompt.grid_thw,
        )


def reward_token_id(tokenizer) -> int:
    """Id of `<Reward>`. Raises ValueError when the tokenizer does not hold it as one token."""
    ids = tokenizer(REWARD_TOKEN, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer splits {REWARD_TOKEN!r} into {len(ids)} tokens: this is not a reward checkpoint"
        )
    return ids[0]


def compute_mrope_positions(
    input_ids: torch.Tensor, *, video_token_id: int, grid_thw: tuple[int, int, int], merge_size: int
) -> torch.Tensor:
    """M-RoPE positions of a sequence with one video, int64 [3, length] (time, height, width).

    Each text token advances all three by one. A frame group of h x w merged tokens has one time position, spreads over
    rows and columns, and advances the text after it by max(h, w) (Qwen3-VL, where timestamps as text carry the time).
    """
    num_groups = grid_thw[0]
    height, width = grid_thw[1] // merge_size, grid_thw[2] // merge_size
    is_video = input_ids == video_token_id
    if int(is_video.sum()) != num_groups * height * width:
        raise ValueError(f"{int(is_video.sum())} video tokens do not fit a grid of {num_groups} x {height} x {width}")
    # Every token advances the position after it by 1 (text) or, once per group, by max(height, width).
    step = torch.where(is_video, 0, 1)
    slots = is_video.nonzero(as_tuple=True)[0].view(num_groups, height * width)
    step[slots[:, -1]] = max(height, width)
    start = torch.cumsum(step, dim=0) - step
    positions = start.expand(3, -1).clone()
    rows = torch.arange(height).repeat_interleave(width).expand(num_groups, -1)
    columns = torch.arange(width).repeat(height).expand(num_groups, -1)
    group_start = start[slots[:, :1]]
    positions[0, slots] = group_start.expand_as(slots)
    positions[1, slots] = group_start + rows
    positions[2, slots] = group_start + columns
    return positions


def pack_sequences(sequences: Sequence[ScoredSequence]) -> PackedSequences:
    """Lay sequences one after the other in one row."""
    lengths = torch.tensor([sequence.input_ids.numel() for sequence in sequences])
    ends = torch.cumsum(lengths, dim=0)
    starts = ends - lengths
    return PackedSequences(
        input_ids=torch.cat([sequence.input_ids for sequence in sequences]),
        position_ids=torch.cat([sequence.position_ids for sequence in sequences], dim=1),
        cu_seq_lens=torch.cat([torch.zeros(1, dtype=ends.dtype), ends]).to(torch.int32),
        max_seq_len=int(lengths.max()),
        video_positions=torch.cat(
            [start + sequence.video_positions for start, sequence in zip(starts, sequences, strict=True)]
        ),
        reward_positions=starts + torch.tensor([sequence.reward_position for sequence in sequences]),
        pixel_values=torch.cat([sequence.pixel_values for sequence in sequences]),
        video_grid_thw=torch.tensor([sequence.grid_thw for sequence in sequences]),
    )
