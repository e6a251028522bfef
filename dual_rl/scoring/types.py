"""What crosses module boundaries in scoring: tasks, outcomes, settings, and the base of an engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from verl.data.scored_sequence import forbidden_token_ids, reward_token_id
from verl.data.vision_process import VideoFrames
from verl.model.reward_files import PolicyCheckpoint
from verl.types import VideoPrompt

MAX_PROMPT_LENGTH = 8192
NUM_TOKENS_AFTER_COT = 2
"""`<Reward>`, and one that vLLM writes after it."""


@dataclass(frozen=True)
class VideoTask:
    """A video to score. `name` identifies the task. `video`: a path, or frames that are already sampled and resized.

    `problem`: the user turn with at most one `<video>`.
    """

    name: str
    video: str | VideoFrames
    problem: str


@dataclass(frozen=True)
class ScoredVideo:
    """`reward` after the chain of thought `cot` of `num_tokens` tokens. `is_finished`: it ended by itself.

    If it was cut at the length limit, the reward is read after what there is.
    """

    name: str
    reward: float
    cot: str
    num_tokens: int
    is_finished: bool


@dataclass(frozen=True)
class FailedVideo:
    """`error` says what is wrong with the video or its problem, and names the file."""

    name: str
    error: str


Outcome = ScoredVideo | FailedVideo


def setting(default: object, text: str) -> Any:
    """A field of a dataclass that is a flag of a command line, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ScoringSettings:
    """How videos are scored; each is a flag of inference.py and serve.py.

    `max_prompt_length`: None for what the model's positions leave, at most MAX_PROMPT_LENGTH. `video_fps`,
    `max_pixels`: None for what the model was trained with.
    """

    backend: Literal["vllm", "hf"] = setting("vllm", "hf: plain transformers")
    batch_size: int = setting(64, "videos in an engine at a time")
    max_prompt_length: int | None = setting(None, "tokens, the video's included; default: what the model takes")
    max_new_tokens: int = setting(4096, "tokens of the chain of thought")
    repetition_penalty: float = setting(1.05, "1 for none")
    mask_cot: bool = setting(False, "score without a chain of thought: <Reward> follows the prompt")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on GPUs, fp32 on CPUs")
    gpu_memory_utilization: float = setting(0.9, "share of the GPU for vLLM")
    kv_cache_gib: int | None = setting(None, "of vLLM; default: what gpu_memory_utilization leaves, 2 on a CPU")
    enforce_eager: bool = setting(False, "start faster, write slower")
    num_threads: int = setting(4, "that decode videos, per engine")
    video_fps: float | None = setting(None, "default: as the model was trained")
    max_pixels: int | None = setting(None, "of a frame; default: as the model was trained")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_prompt_length", "max_new_tokens", "kv_cache_gib", "num_threads"):
            require_positive(name, getattr(self, name))
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be positive, 1 for none")


def require_positive(name: str, value: int | None) -> None:
    """Raise ValueError for a count below 1; None is a default."""
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class ThoughtScore:
    """What an engine returns: ids of the chain of thought without EOS, whether it ended by itself, and the reward."""

    cot_ids: tuple[int, ...]
    is_finished: bool
    reward: float


class ScoringEngine:
    """Writes a greedy chain of thought for each prompt and reads the reward at `<Reward>` after it.

    With `mask_cot` there is no chain of thought: `cot_ids` is empty and `is_finished` true, as nothing was cut.
    `is_continuous`: takes new prompts while it works on others; otherwise a step is a batch, the fuller the better.
    """

    is_continuous: bool

    def __init__(self, checkpoint: PolicyCheckpoint, settings: ScoringSettings) -> None:
        """`settings.max_prompt_length` must be set."""
        processor = checkpoint.processor
        self.settings = settings
        self.head_weight = checkpoint.head_weight
        self.reward_token_id = reward_token_id(processor.tokenizer)
        self.eos_token_id = processor.tokenizer.eos_token_id
        self.forbidden_token_ids = forbidden_token_ids(processor, checkpoint.config.text_config.vocab_size)
        self.max_model_len = settings.max_prompt_length + settings.max_new_tokens + NUM_TOKENS_AFTER_COT

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the model's weights, pairs of Hugging Face name and whole tensor; the head is the checkpoint's."""

    def submit(self, name: str, prompt: VideoPrompt) -> None:
        """Take a prompt that fits; the caller has checked its length."""

    def step(self) -> Sequence[tuple[str, ThoughtScore]]:
        """Work for a while; returns what has become ready, by name."""

    @property
    def num_unfinished(self) -> int:
        """Prompts that were submitted and are not ready yet."""

    def close(self) -> None:
        """Stop the engine."""
