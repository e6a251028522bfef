"""The scored sequence: one definition for rollout, update, validation and scoring, the same as stage 1's.

    user:       <text before "<video>">  <video frames>  <text after "<video>">
    assistant:  CoT  <Reward>  <EOS>

Here the user turn is built once per video, and the CoT arrives as the ids that were generated. Preprocessed pixels
are 24 times as large as the uint8 frames and therefore not kept with the prompt: `SequenceBuilder.pixel_values` makes
them when the vision tower needs them, on its device.
"""

import math
from functools import cached_property

import torch
from transformers.video_utils import VideoMetadata

from descore.checked import digest
from descore.format_prompt import FormatPrompt
from verl.data.vision_process import VideoBudget, VideoFrames, VideoHeader, budgeted_size, sampled_indices
from verl.types import VideoKey, VideoPrompt

REWARD_TOKEN = "<Reward>"
VIDEO_PLACEHOLDER = "<video>"
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


class SequenceBuilder:
    """Builds prompts with a checkpoint's own processor and chat template.

    `processor`: a Qwen3-VL processor whose tokenizer knows `<Reward>`. `format_prompt`: a Jinja template with the
    variable `content` that wraps the problem. Raises ValueError when `<Reward>` is not one token or the
    template does not render.
    """

    def __init__(self, processor, *, format_prompt: str = DEFAULT_FORMAT_PROMPT) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.format_prompt = FormatPrompt(format_prompt)
        self.reward_token_id = reward_token_id(self.tokenizer)
        self.merge_size: int = processor.video_processor.merge_size

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the tokens of a prompt depend on, beside text and video."""
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
        return self.processor.video_processor.patch_size * self.merge_size

    def render(self, problem: str) -> str:
        """The chat text of the user turn with one video placeholder token, ending in the generation prompt.

        Raises ValueError when the problem contains a reserved token or more than one `<video>`.
        """
        content = self.format_prompt.render(problem)
        for reserved in self._reserved_texts:
            if reserved in content:
                raise ValueError(f"problem contains the reserved token {reserved!r}; remove it")
        parts = content.split(VIDEO_PLACEHOLDER)
        if len(parts) > 2:
            raise ValueError(f"problem contains {VIDEO_PLACEHOLDER!r} {len(parts) - 1} times; once is allowed")
        before, after = parts if len(parts) == 2 else ("", parts[0])
        blocks = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": after}]
        blocks = [block for block in blocks if block.get("text") != ""]
        messages = [{"role": "user", "content": blocks}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode_prompt(self, key: VideoKey, problem: str, video: VideoFrames) -> VideoPrompt:
        """Tokenise the user turn of one video (frames already sampled and resized)."""
        text = self.render(problem)
        num_frames, _, height, width = video.frames.shape
        grid_thw = self._grid(num_frames, height, width)
        metadata = VideoMetadata(
            total_num_frames=video.total_frames, fps=video.source_fps, frames_indices=list(video.frame_indices)
        )
        return VideoPrompt(
            key=key,
            text=text,
            input_ids=torch.tensor(self._tokenize(text, grid_thw, metadata)),
            video=video,
            grid_thw=grid_thw,
        )

    def count_prompt_tokens(self, problem: str, header: VideoHeader, budget: VideoBudget) -> int:
        """Length of `encode_prompt(...).input_ids` for a clip with this header, without decoding it."""
        indices = sampled_indices(header, budget)
        height, width = budgeted_size(header.height, header.width, budget, size_factor=self.size_factor)
        metadata = VideoMetadata(total_num_frames=header.total_frames, fps=header.fps, frames_indices=list(indices))
        return len(self._tokenize(self.render(problem), self._grid(len(indices), height, width), metadata))

    def pixel_values(self, prompt: VideoPrompt, device: torch.device | str = "cpu") -> torch.Tensor:
        """Input of the vision tower, float32 [num_patches, patch_dim] on `device`, by the stock video processor."""
        inputs = self.processor.video_processor(
            videos=[prompt.video.frames],
            video_metadata=[prompt.video.metadata],
            do_resize=False,
            do_sample_frames=False,
            device=str(device),
            return_tensors="pt",
        )
        return inputs["pixel_values_videos"]

    def _grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        video_processor = self.processor.video_processor
        patch_size, frames_per_group = video_processor.patch_size, video_processor.temporal_patch_size
        return math.ceil(num_frames / frames_per_group), height // patch_size, width // patch_size

    def _tokenize(self, text: str, grid_thw: tuple[int, int, int], metadata: VideoMetadata) -> list[int]:
        """Ids of the rendered text with its video placeholder expanded to timestamps and video tokens."""
        inputs = {"video_grid_thw": torch.tensor([grid_thw]), "video_metadata": [metadata]}
        text = text.replace(self.processor.video_token, self.processor.replace_video_token(inputs, 0), 1)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def reward_token_id(tokenizer) -> int:
    """Id of `<Reward>`. Raises ValueError when the tokenizer does not hold it as one token."""
    ids = tokenizer(REWARD_TOKEN, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer splits {REWARD_TOKEN!r} into {len(ids)} tokens: this is not a reward checkpoint"
        )
    return ids[0]


def forbidden_token_ids(processor, num_embeddings: int) -> list[int]:
    """Ids that the policy can never draw, ascending: the one list for rollout, update and inference.

    `<Reward>`, the vision tokens, padding, and the `num_embeddings - len(tokenizer)` rows that stand for no token.
    (Qwen3-VL pads with `<|endoftext|>`, which its generation config also takes for an end; forbidding it leaves one
    EOS, the tokenizer's.)
    """
    tokenizer = processor.tokenizer
    special = {
        reward_token_id(tokenizer),
        processor.image_token_id,
        processor.video_token_id,
        processor.vision_start_token_id,
        processor.vision_end_token_id,
        tokenizer.pad_token_id,
    }
    special -= {None, tokenizer.eos_token_id}
    return sorted(special | set(range(len(tokenizer), num_embeddings)))


def compute_mrope_positions(
    input_ids: torch.Tensor, *, video_token_id: int, grid_thw: tuple[int, int, int], merge_size: int
) -> torch.Tensor:
    """M-RoPE positions of a sequence with one video, int64 [3, length] (time, height, width).

    Text advances all three by one a token. A frame group of h x w merged tokens shares one time position, spreads over
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
