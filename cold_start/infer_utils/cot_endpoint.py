"""Chains of thought (CoTs) from an OpenAI-compatible chat server, a video and its samples to a thread.

The frames are sampled and resized here as training does. How they are sent is a choice between reach and exactness:

- `clip`: a clip of just these frames, encoded without loss, at the rate that spreads them over the time of the video.
  A server that samples 2 frames a second or more, and at least 4, takes them all. The prompt may differ from
  training's in the last digit of a timestamp: a clip's frames are evenly spaced, whole frame numbers are not.
- `frames`: the same prompt as in training, token for token: PNG frames with their numbers, in vLLM's own form of a
  video. The server must be vLLM, started with --trust-request-mm-kwargs.
- `file`: the video file as it is; the server samples and resizes in its own way.

The chat template is the server's, and so are sampling settings that a request does not name, such as top_k.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, get_args

import av
import numpy as np
from PIL import Image

from infer_utils.chat_client import ChatClient, RequestError, ServerError
from infer_utils.cot_journal import Sample, SampleKey
from infer_utils.cot_plan import Sampling, VideoFailure, VideoJob
from scored_sequence import SequenceBuilder
from vision_process import VideoBudget, VideoError, VideoFrames, load_video

VideoForm = Literal["clip", "frames", "file"]
VIDEO_FORMS: tuple[VideoForm, ...] = get_args(VideoForm)
TRUST_FLAG = "--trust-request-mm-kwargs"
LARGEST_DENOMINATOR = 1001
"""Frame rates are fractions such as 30000 / 1001."""


class EndpointSource:
    """`CotSource` with a server. `form`: how videos are sent. `concurrency`: requests at a time."""

    def __init__(
        self,
        client: ChatClient,
        model: str,
        *,
        builder: SequenceBuilder,
        budget: VideoBudget,
        sampling: Sampling,
        form: VideoForm,
        concurrency: int,
    ) -> None:
        self.client = client
        self.model = model
        self.builder = builder
        self.budget = budget
        self.sampling = sampling
        self.form = form
        self.concurrency = concurrency

    def check(self) -> int | None:
        """See `CotSource`: asks the server for its models."""
        models = self.client.find_models()
        if models is None:
            return None
        if self.model not in models:
            raise ValueError(f"{self.client.url} has no model {self.model!r}, only {', '.join(models)}: see --model")
        limit = models[self.model].get("max_model_len")  # vLLM tells
        return limit if isinstance(limit, int) else None

    def collect(self, jobs: Sequence[VideoJob]) -> Iterator[Sample | VideoFailure]:
        """See `CotSource`."""
        results: SimpleQueue = SimpleQueue()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for job in jobs:
                pool.submit(self._think, job, results.put).add_done_callback(results.put)
            num_open = len(jobs)
            while num_open:
                result = results.get()
                if isinstance(result, Future):
                    num_open -= 1
                    result.result()  # raises what ended the job
                else:
                    yield result
        finally:
            self.client.close()
            pool.shutdown(cancel_futures=True)

    def _think(self, job: VideoJob, put: Callable[[Sample | VideoFailure], None]) -> None:
        """All samples of a video, one after the other: after the first the server knows prompt and video."""
        try:
            content, extra = self._build_content(job)
            for key in job.keys:
                put(self._ask(job, key, content, extra))
        except (VideoError, RequestError) as error:
            put(VideoFailure(job.row, job.side, str(error)))

    def _build_content(self, job: VideoJob) -> tuple[list[dict], dict]:
        """The user turn, and the request's fields beyond OpenAI's."""
        if self.form == "file":
            url, extra = _data_url("video/mp4", [Path(job.video).read_bytes()]), {}
        else:
            video = load_video(job.video, self.budget, size_factor=self.builder.size_factor)
            url, extra = encode_frames(video) if self.form == "frames" else (encode_clip(video), {})
        block = {"type": "video_url", "video_url": {"url": url}}
        return [block if b["type"] == "video" else b for b in self.builder.user_blocks(job.problem)], extra

    def _ask(self, job: VideoJob, key: SampleKey, content: Sequence[dict], extra: Mapping[str, object]) -> Sample:
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": self.sampling.seed_of(key),
            **extra,
        }
        try:
            reply = self.client.complete(json.dumps(request).encode())
        except RequestError as error:
            if extra and TRUST_FLAG in str(error):
                raise ServerError(f"{error}. Or send another form: --send_video clip") from error
            raise
        sample = _read_reply(key, reply)
        if self.form == "frames" and sample.num_prompt_tokens not in (None, job.num_prompt_tokens):
            raise ServerError(
                f"row {key.row}, video {key.side}: the server reads a prompt of {sample.num_prompt_tokens} tokens, "
                f"training one of {job.num_prompt_tokens}: it is no vLLM that takes frames, or has another model's "
                "chat template. Send another form (--send_video clip), or correct --processor"
            )
        return sample


def _read_reply(key: SampleKey, reply: Mapping[str, object]) -> Sample:
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, is_finished = message["content"] or "", choice["finish_reason"] == "stop"
        num_prompt_tokens = (reply.get("usage") or {}).get("prompt_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServerError(f"the reply is none of a chat server: {json.dumps(reply)[:300]}") from error
    if message.get("reasoning_content") or message.get("reasoning"):
        raise ServerError("the server takes the reasoning out of its answers: start it without a reasoning parser")
    text = text.encode(errors="replace").decode()  # JSON can hold halves of characters, which no file takes
    return Sample(key=key, text=text, is_finished=is_finished, num_prompt_tokens=num_prompt_tokens)


def encode_frames(video: VideoFrames) -> tuple[str, dict[str, object]]:
    """vLLM's form of a video whose frames are sampled and resized, and the request's fields that go with it.

    vLLM calls the type video/jpeg, but reads any kind of image; PNG loses nothing.
    """
    pictures = []
    for frame in _as_images(video):
        with io.BytesIO() as file:
            Image.fromarray(frame).save(file, "PNG")
            pictures.append(file.getvalue())
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
    """The frames as a clip without loss: H.264 in RGB. Example: 10 frames over 125 / 24 s come at 1.728 a second."""
    images = _as_images(video)
    source_rate = Fraction(video.source_fps).limit_denominator(LARGEST_DENOMINATOR)
    rate = source_rate * (len(images) - 1) / (video.frame_indices[-1] - video.frame_indices[0])
    with io.BytesIO() as file:
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
