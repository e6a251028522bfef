"""What crosses module boundaries in scoring: tasks, outcomes, settings, and the base of an engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from verl.data.scored_sequence import forbidden_token_ids, reward_token_id
from verl.data.vision_process import VideoFrames
from verl.model.reward_files import PolicyCheckpoint
from verl.types import Sampling, VideoPrompt

MAX_PROMPT_LENGTH = 8192
NUM_TOKENS_AFTER_COT = 2
"""`<Reward>`, and one that vLLM writes after it."""
SAMPLING_TEMPERATURE = 1.0
"""Of several thoughts: the distribution that stage 2 draws from in training."""


@dataclass(frozen=True)
class VideoTask:
    """A video to score. `name` identifies the task. `video`: a path, or frames that are already sampled and resized.

    `problem`: the user turn with at most one `<video>`. `num_thoughts`: 0 for none, so that `<Reward>` follows the
    prompt, 1 for a greedy one, k > 1 for as many that are drawn; None for what the settings say.
    """

    name: str
    video: str | VideoFrames
    problem: str
    num_thoughts: int | None = None


@dataclass(frozen=True)
class Thought:
    """`reward` after the chain of thought `cot` of `num_tokens` tokens. `is_finished`: it ended by itself.

    If it was cut at the length limit, the reward is read after what there is.
    """

    reward: float
    cot: str
    num_tokens: int
    is_finished: bool


@dataclass(frozen=True)
class ScoredVideo:
    """The reward after one thought, fields as of `Thought`, or that of several.

    Of several `thoughts`, `reward` is the mean and `standard_error` the mean's, stdev / sqrt(k); `cot` is the one
    whose reward is closest to the mean, `num_tokens` the sum, and `is_finished` says that none was cut.
    """

    name: str
    reward: float
    cot: str
    num_tokens: int
    is_finished: bool
    standard_error: float | None = None
    thoughts: tuple[Thought, ...] = ()


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
    batch_size: int = setting(64, "videos in an engine at a time, and thoughts that it writes at a time")
    max_prompt_length: int | None = setting(None, "tokens, the video's included; default: what the model takes")
    max_new_tokens: int = setting(4096, "tokens of the chain of thought")
    repetition_penalty: float = setting(1.05, "1 for none")
    num_thoughts: int = setting(1, "1: greedy; more: as many are drawn, and the reward is their mean")
    seed: int = setting(0, "of drawn thoughts, and of bootstrap intervals")
    mask_cot: bool = setting(False, "score without a chain of thought: <Reward> follows the prompt")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on GPUs, fp32 on CPUs")
    quantization: Literal["none", "fp8"] = setting("none", "fp8: the language model's weights; vllm on GPUs")
    kv_cache_dtype: Literal["auto", "fp8"] = setting("auto", "fp8: half the cache; vllm on GPUs")
    gpu_memory_utilization: float = setting(0.9, "share of the GPU for vLLM")
    kv_cache_gib: int | None = setting(None, "of vLLM; default: what gpu_memory_utilization leaves, 2 on a CPU")
    enforce_eager: bool = setting(False, "start faster, write slower")
    num_threads: int = setting(4, "that decode videos, per engine")
    video_fps: float | None = setting(None, "default: as the model was trained")
    max_pixels: int | None = setting(None, "of a frame; default: as the model was trained")

    def __post_init__(self) -> None:
        counts = ("batch_size", "max_prompt_length", "max_new_tokens", "kv_cache_gib", "num_threads", "num_thoughts")
        for name in counts:
            require_positive(name, getattr(self, name))
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be positive, 1 for none")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if self.mask_cot and self.num_thoughts > 1:
            raise ValueError("mask_cot leaves no thought of which there could be several. Leave out num_thoughts.")

    def require_device(self, device: torch.device) -> None:
        """Raise ValueError for FP8 without vLLM or a GPU."""
        is_quantized = self.quantization == "fp8" or self.kv_cache_dtype == "fp8"
        if is_quantized and (self.backend != "vllm" or device.type == "cpu"):
            raise ValueError("fp8 needs the vllm backend on a GPU. Leave out quantization and kv_cache_dtype.")


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
    """Writes a greedy chain of thought for each prompt, or draws several; reads the reward at `<Reward>` after each.

    Without a thought `cot_ids` is empty and `is_finished` true, as nothing was cut. Draws depend on the weights, the
    prompt and its key, and the settings' seed, not on the batch.
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

    def submit(self, name: str, prompt: VideoPrompt, num_thoughts: int) -> None:
        """Take a prompt that fits; the caller has checked its length. `num_thoughts`: as of `VideoTask`."""

    def step(self) -> Sequence[tuple[str, tuple[ThoughtScore, ...]]]:
        """Work for a while; returns what has become ready, by name: a score for each thought, or the one without."""

    def sampling(self, num_thoughts: int) -> Sampling:
        """How thoughts are written."""
        return Sampling(
            n=num_thoughts,
            temperature=0.0 if num_thoughts == 1 else SAMPLING_TEMPERATURE,
            top_p=1.0,
            top_k=-1,
            max_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            repetition_penalty=self.settings.repetition_penalty,
        )

    @property
    def num_unfinished(self) -> int:
        """Prompts that were submitted and are not ready yet."""

    def close(self) -> None:
        """Stop the engine."""
