"""Samples chains of thought (CoTs) on an OpenAI-compatible server.

Frames are sampled and resized here, by training's own function. What the server reads depends on how they are sent: as
a small lossless clip at the rate that spreads them over the length of the video, as PNG with their indices in vLLM's
own format, or as the video file (see the README).
"""

import asyncio
import base64
import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
import openai
from openai.types.chat import ChatCompletion
from PIL import Image

from scored_sequence import SequenceBuilder
from vision_process import VideoBudget, VideoError, VideoFrames, load_video

VideoForm = Literal["clip", "frames", "file"]
VIDEO_FORMS: tuple[VideoForm, ...] = get_args(VideoForm)
NUM_RETRIES = 20
"""After a lost connection, 408, 409, 429 or 5xx; the pauses add up to about two minutes."""
CONNECT_SECONDS = 30.0
MESSAGE_LENGTH = 300
NO_KEY = "EMPTY"
"""The usual key for a vLLM that needs none. With None the client would send the user's OPENAI_API_KEY."""
TRUST_FLAG = "--trust-request-mm-kwargs"
STOPPING_STATUSES = (401, 403, 404, 429, 502, 503, 504)
"""Wrong key, wrong model or a server that stays busy: every other request would get them too."""


class SampleKey(NamedTuple):
    """Which sample: `row` of the CSV from 1, `side` A or B, and its number from 0."""

    row: int
    side: str
    number: int


@dataclass(frozen=True)
class Sample:
    """A CoT as the model wrote it, without EOS.

    `is_finished`: it ended by itself, not at the length limit. `num_prompt_tokens`: what the server read before it,
    None if the server does not say.
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


@dataclass(frozen=True)
class VideoJob:
    """A video, and the samples to draw. `num_prompt_tokens`: of training's prompt, the video included."""

    row: int
    side: str
    path: str
    problem: str
    num_prompt_tokens: int
    keys: tuple[SampleKey, ...]


def seed_of(seed: int, key: SampleKey) -> int:
    """A seed from 0 to 2**31 - 1, which every server accepts. It depends on the run's seed and the key only."""
    text = f"{seed}/{key.row}/{key.side}/{key.number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1


class RequestError(ValueError):
    """The server refused one request, or failed to answer it."""


@dataclass(frozen=True)
class Endpoint:
    """A server, up to /v1, and what it is asked; the URL is empty until one is started here.

    `options`: the command line, with the model's name and the sampling. `builder`, `budget`: training's prompts and
    frames. The server's own chat template applies, and its own values of settings that a request does not name, such
    as top_k.
    """

    options: Namespace
    builder: SequenceBuilder
    budget: VideoBudget
    url: str
    send_video: VideoForm

    def check(self) -> int | None:
        """The most tokens of a prompt and its CoT; None if the server does not say.

        Raises ValueError if the server cannot be used.
        """

        async def list_models() -> object:
            async with self._connect() as client:
                return await self._request(client.get("/models", cast_to=object))

        reply = asyncio.run(list_models())
        try:
            limits = {model["id"]: model.get("max_model_len") for model in reply["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.url}/models is not a list of models. Check --endpoint.") from error
        model = self.options.model
        if model not in limits:
            raise ValueError(f"{self.url} has no model {model!r}, only {', '.join(limits)}. Check --model.")
        return limits[model]

    def generate(self, jobs: Sequence[VideoJob], put: Callable[[Sample | VideoFailure], None]) -> None:
        """Give `put` the samples of all jobs, each as soon as it exists. Raises ValueError if the run cannot go on."""

        async def answer_all() -> None:
            slots = asyncio.Semaphore(self.options.concurrency)
            async with self._connect() as client, asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self._answer(client, job, slots, put))

        try:
            asyncio.run(answer_all())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _connect(self) -> openai.AsyncOpenAI:
        timeout, key_file = openai.Timeout(self.options.timeout, connect=CONNECT_SECONDS), self.options.api_key_file
        key = Path(key_file).read_text().strip() if key_file else NO_KEY
        # The server that is started here is on this machine: no proxy is between.
        direct = {} if self.options.endpoint else {"http_client": openai.DefaultAsyncHttpxClient(trust_env=False)}
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=NUM_RETRIES, timeout=timeout, **direct)

    async def _answer(self, client: openai.AsyncOpenAI, job: VideoJob, slots: asyncio.Semaphore, put) -> None:
        """All samples of a video, one after another: after the first, the server has cached prompt and video."""
        async with slots:
            try:
                request = await asyncio.to_thread(self._build_request, job)
                for key in job.keys:
                    call = client.chat.completions.create(**request, seed=seed_of(self.options.seed, key))
                    put(self._read(job, key, await self._request(call)))
            except (VideoError, RequestError) as error:
                put(VideoFailure(job.row, job.side, str(error)))

    def _build_request(self, job: VideoJob) -> dict[str, object]:
        """The arguments of a video's requests, apart from the seed."""
        options, fields = self.options, {}
        if self.send_video == "file":
            try:
                url = _data_url("video/mp4", [Path(job.path).read_bytes()])
            except OSError as error:
                raise VideoError(f"video cannot be read ({error.strerror}): {job.path}") from error
        else:
            video = load_video(job.path, self.budget, size_factor=self.builder.size_factor)
            url, fields = encode_frames(video) if self.send_video == "frames" else (encode_clip(video), {})
        block = {"type": "video_url", "video_url": {"url": url}}
        blocks = [block if b["type"] == "video" else b for b in self.builder.user_blocks(job.problem)]
        return {
            "model": options.model,
            "messages": [{"role": "user", "content": blocks}],
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_tokens,
            "extra_body": fields,
        }

    async def _request(self, call: Awaitable):
        """A reply. Raises RequestError, and ValueError for errors that every other request would meet too."""
        try:
            async with asyncio.timeout(self.options.timeout):
                return await call
        except TimeoutError as error:
            raise RequestError(f"no reply within {self.options.timeout:g} s") from error
        except openai.APIStatusError as error:
            message = " ".join(str(error).split())[:MESSAGE_LENGTH]
            if error.status_code in STOPPING_STATUSES or TRUST_FLAG in message:
                remedy = "Check --endpoint, --model, --api_key_file and --send_video, or try again later."
                raise ValueError(f"{self.url}: {message}. {remedy}") from error
            raise RequestError(message) from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.url}: the reply is not JSON. Check --endpoint.") from error
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            message = f"{self.url} cannot be reached: {reason}. Check --endpoint, and start the server."
            raise ValueError(message) from error

    def _read(self, job: VideoJob, key: SampleKey, reply: ChatCompletion) -> Sample:
        try:
            choice = reply.choices[0]
            text, is_finished = choice.message.content or "", choice.finish_reason == "stop"
            extras = choice.message.model_extra or {}
            num_tokens = reply.usage.prompt_tokens if reply.usage else None
        except (AttributeError, IndexError, TypeError) as error:  # the client does not validate replies
            reason = f"the reply is not a chat completion: {str(reply)[:MESSAGE_LENGTH]}"
            raise ValueError(f"{self.url}: {reason}. Check --endpoint.") from error
        if extras.get("reasoning_content") or extras.get("reasoning"):
            raise ValueError(f"{self.url} strips the reasoning from its answers. Start it without a reasoning parser.")
        if self.send_video == "frames" and num_tokens not in (None, job.num_prompt_tokens):
            raise ValueError(
                f"row {key.row}, video {key.side}: the server's prompt of {num_tokens} tokens is not training's of "
                f"{job.num_prompt_tokens}: it is not a vLLM that takes frames, or has another model's chat template. "
                "Use --send_video clip, or correct --processor."
            )
        text = text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, which UTF-8 cannot
        return Sample(key, text, is_finished, num_tokens)


def encode_frames(video: VideoFrames) -> tuple[str, dict[str, object]]:
    """vLLM's form of sampled and resized frames, and the fields that a request with them needs.

    vLLM calls the type video/jpeg but reads any image format; PNG is lossless.
    """
    files = [io.BytesIO() for _ in video.frames]
    for frame, file in zip(_as_images(video), files, strict=True):
        Image.fromarray(frame).save(file, "PNG")
    pictures = [file.getvalue() for file in files]
    metadata = {
        "fps": video.source_fps,
        "frames_indices": list(video.frame_indices),
        "total_num_frames": video.total_frames,
        "num_frames": len(pictures),
        "do_sample_frames": False,
    }
    fields = {"media_io_kwargs": {"video": metadata}, "mm_processor_kwargs": {"do_resize": False}}
    return _data_url("video/jpeg", pictures), fields


def encode_clip(video: VideoFrames) -> str:
    """The frames as a lossless clip, H.264 in RGB. Example: 10 frames over 125 / 24 s have a rate of 1.728."""
    images = _as_images(video)
    source_rate = Fraction(video.source_fps).limit_denominator(1001)  # such as 30000 / 1001
    rate = source_rate * (len(images) - 1) / (video.frame_indices[-1] - video.frame_indices[0])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=rate)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt, stream.options = "rgb24", {"qp": "0"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return _data_url("video/mp4", [file.getvalue()])


def _as_images(video: VideoFrames) -> np.ndarray:
    """uint8 [num_frames, height, width, 3]."""
    return video.frames.permute(0, 2, 3, 1).contiguous().numpy()


def _data_url(media_type: str, parts: Sequence[bytes]) -> str:
    return f"data:{media_type};base64," + ",".join(base64.b64encode(part).decode() for part in parts)
