"""The bodies of requests: JSON, and multipart forms whose videos go to files."""

import shutil
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from serving.limits import MEGABYTE, RETRY_LATER, RefusedError, ServerLimits

MAX_JSON_MB = 4
"""A JSON body is held in memory."""
BYTES_PER_CHARACTER = 4
"""At most, in UTF-8."""


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
    """A file to score, and the client's name for it."""

    path: str
    name: str


def limit_body(request: Request, max_mb: float) -> Request:
    """The same request; reading more of its body raises RefusedError, at once where its length is announced."""
    max_bytes = int(max_mb * MEGABYTE)
    refused = RefusedError(413, "body_too_large", f"the body is over {max_bytes} bytes; send fewer or smaller videos")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise refused
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise refused
        return message

    return Request(request.scope, receive)


async def read_json(request: Request) -> ScoreRequest:
    """Raises RefusedError for anything else."""
    try:
        return ScoreRequest.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RefusedError(422, "invalid", f"the body is not a request to score: {place}: {first['msg']}") from error


async def read_form(request: Request, folder: Path, limits: ServerLimits) -> tuple[list[Video], list[str]]:
    """Videos, now in files of `folder`, and prompts. Raises RefusedError, or starlette's HTTPException."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RefusedError(415, "invalid", "send multipart/form-data with files `videos` and fields `prompts`")
    max_part_size = BYTES_PER_CHARACTER * limits.max_prompt_chars
    most = limits.max_videos
    try:
        async with request.form(max_files=most, max_fields=most, max_part_size=max_part_size) as form:
            uploads, prompts = form.getlist("videos"), form.getlist("prompts")
            has_files = all(isinstance(upload, UploadFile) for upload in uploads)
            if not has_files or not all(isinstance(prompt, str) for prompt in prompts):
                raise RefusedError(422, "invalid", "send `videos` as files and `prompts` as fields")
            if set(form) - {"videos", "prompts"}:
                raise RefusedError(422, "invalid", "the form has other parts than `videos` and `prompts`")
            limits.check_request(len(uploads), prompts)
            return [await _store(upload, number, folder) for number, upload in enumerate(uploads)], prompts
    except OSError as error:
        message = f"the server cannot store the upload: {error.strerror}"
        raise RefusedError(503, "disk", message, retry_after=RETRY_LATER) from error


async def _store(upload: UploadFile, number: int, folder: Path) -> Video:
    """Starlette's temporary files have no path, which decoders need."""
    path = folder / f"video_{number}"
    with path.open("xb") as file:
        await run_in_threadpool(shutil.copyfileobj, upload.file, file)
    await upload.close()
    return Video(str(path), f"videos[{number}] {upload.filename}".rstrip())
