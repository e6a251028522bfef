"""What a request may ask for: limits and refusals, bodies (JSON, or forms whose videos go to files), allowed paths."""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from scoring.types import setting
from verl.data.vision_process import VideoFrames

MEGABYTE = 1 << 20
MAX_JSON_MB = 4
"""A JSON body is held in memory."""
UTF8_BYTES = 4
"""Of a character, at most."""
RETRY_SOON, RETRY_LATER = 2, 10
"""Seconds of Retry-After: while others are served, and while the server starts or stops."""


def refuse(status: int, message: str, *, retry_after: int | None = None) -> HTTPException:
    """The error to raise for an answer other than 200, with its message for the client."""
    return HTTPException(status, message, {} if retry_after is None else {"Retry-After": str(retry_after)})


@dataclass(frozen=True)
class ServerLimits:
    """Each is a flag of serve.py."""

    max_body_mb: float = setting(256.0, "per upload")
    max_videos: int = setting(64, "per request")
    max_prompt_chars: int = setting(8000, "per prompt")
    max_thoughts: int = setting(64, "per video that a request may ask for")
    max_queue: int = setting(1024, "videos that wait; more are refused with 503")
    max_receiving: int = setting(128, "bodies that arrive at the same time")
    body_timeout: float = setting(120.0, "seconds for a whole body")

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            if not 0 < getattr(self, limit.name) < math.inf:
                raise ValueError(f"{limit.name} is {getattr(self, limit.name)}; it must be positive")
        if self.max_videos > self.max_queue:
            raise ValueError(f"max_videos={self.max_videos} is over max_queue={self.max_queue}; raise max_queue")

    def check(self, num_videos: int, prompts: Sequence[str]) -> None:
        """Raise HTTPException unless there is one prompt per video, and neither too many nor too long ones."""
        if num_videos != len(prompts) or not num_videos:
            raise refuse(422, f"{num_videos} video(s) and {len(prompts)} prompt(s); give one prompt for each video")
        if num_videos > self.max_videos:
            raise refuse(422, f"{num_videos} videos in a request; send at most {self.max_videos}")
        if (longest := max(map(len, prompts))) > self.max_prompt_chars:
            raise refuse(422, f"a prompt has {longest} characters; send at most {self.max_prompt_chars}")


class VideoPath(BaseModel):
    """A video on the server."""

    model_config = ConfigDict(extra="forbid")
    path: str


class ScoreRequest(BaseModel):
    """Body of `/v1/score`."""

    model_config = ConfigDict(extra="forbid")
    videos: list[VideoPath]
    prompts: list[str]


class Video(NamedTuple):
    """A file to score, or its sampled frames, and the client's name for it."""

    source: str | VideoFrames
    name: str


def limit_body(request: Request, max_mb: float) -> Request:
    """The same request; reading more of its body raises HTTPException, at once where its length is announced."""
    max_bytes, num_bytes = int(max_mb * MEGABYTE), 0
    refusal = refuse(413, f"the body is over {max_bytes} bytes; send fewer or smaller videos")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise refusal

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise refusal
        return message

    return Request(request.scope, receive)


def read_num_thoughts(request: Request, limits: ServerLimits) -> int | None:
    """The query's `num_thoughts`; None without. Raises HTTPException unless it is a count within the limit."""
    given = request.query_params.get("num_thoughts")
    if given is None:
        return None
    if not re.fullmatch("[0-9]{1,6}", given) or not 1 <= int(given) <= limits.max_thoughts:
        raise refuse(422, f"num_thoughts is {given[:20]!r}; give a number from 1 to {limits.max_thoughts}")
    return int(given)


async def read_json(request: Request, limits: ServerLimits) -> tuple[list[str], list[str]]:
    """Paths and prompts. Raises HTTPException for anything else."""
    try:
        asked = ScoreRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise refuse(422, f"the body is not a request to score: {describe_invalid(error)}") from error
    limits.check(len(asked.videos), asked.prompts)
    return [video.path for video in asked.videos], asked.prompts


def describe_invalid(error: ValidationError) -> str:
    """The first field that is invalid, and why, without its content."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


async def read_form(request: Request, limits: ServerLimits, folder: Path) -> tuple[list[Video], list[str]]:
    """Videos, now in files of `folder`, and prompts. Raises HTTPException."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise refuse(415, "send multipart/form-data with files `videos` and fields `prompts`")
    most, part_size = limits.max_videos, UTF8_BYTES * limits.max_prompt_chars
    try:
        async with request.form(max_files=most, max_fields=most, max_part_size=part_size) as form:
            uploads, prompts = form.getlist("videos"), form.getlist("prompts")
            has_files = all(isinstance(upload, UploadFile) for upload in uploads)
            if not has_files or not all(isinstance(prompt, str) for prompt in prompts):
                raise refuse(422, "send `videos` as files and `prompts` as fields")
            if set(form) - {"videos", "prompts"}:
                raise refuse(422, "the form has other parts than `videos` and `prompts`")
            limits.check(len(uploads), prompts)
            return [await _store(upload, index, folder) for index, upload in enumerate(uploads)], prompts
    except OSError as error:
        raise refuse(503, f"the server cannot store the upload: {error.strerror}", retry_after=RETRY_LATER) from error


async def _store(upload: UploadFile, index: int, folder: Path) -> Video:
    """Decoders need a path, which starlette's temporary files do not have."""
    path = folder / f"video_{index}"
    with path.open("xb") as file:
        await run_in_threadpool(shutil.copyfileobj, upload.file, file)
    return Video(str(path), f"videos[{index}] {upload.filename}".rstrip())


class AllowedRoots:
    """Folders whose files clients may name.

    Links are resolved before anything is opened, and what is opened later is the resolved path. Whoever can replace
    folders below a root by links between the two steps is trusted: roots should be folders of your own.
    """

    def __init__(self, roots: Sequence[str | os.PathLike]) -> None:
        missing = [os.fspath(root) for root in roots if not os.path.isdir(root)]
        if missing:
            raise ValueError(f"--roots: no such folder: {', '.join(missing)}")
        self.roots = tuple(os.path.realpath(root, strict=True) for root in roots)

    def find(self, path: str) -> Video | None:
        """The regular file below a root that `path` names, or None; relative paths are searched below each root."""
        for root in self.roots:
            try:
                # strict: otherwise a loop of links ends the resolution early, and links behind it stay in the result
                real = os.path.realpath(os.path.join(root, path), strict=True)
            except (OSError, ValueError):  # missing, a loop, not allowed, too long; a NUL byte, a lone surrogate
                continue
            is_below = any(os.path.commonpath([real, allowed]) == allowed for allowed in self.roots)
            if is_below and os.path.isfile(real):
                return Video(real, path)
        return None
