"""A multipart body as it arrives: videos into files of one folder, prompts into memory."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from verl.serving.limits import RETRY_LATER, RefusedError, ServerLimits

BYTES_PER_CHARACTER = 4
VIDEOS, PROMPTS = b"videos", b"prompts"


class Upload(NamedTuple):
    """A video in a file of ours, and the name that the client gave it."""

    path: str
    name: str


class UploadParser:
    """`write` the body, then `finish`; close it, or use it as a context manager.

    `content_type`: the request's, with the boundary. `folder`: takes the files and is removed by who made it. Every
    method raises RefusedError for what is no such form, or more than the limits allow.
    """

    def __init__(self, content_type: str, folder: Path, limits: ServerLimits) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise RefusedError(415, "invalid", "send multipart/form-data with files `videos` and fields `prompts`")
        self.folder = folder
        self.limits = limits
        self.uploads: list[Upload] = []
        self.prompts: list[bytearray] = []
        self._file: BinaryIO | None = None
        self._disposition = bytearray()
        self._header_name = bytearray()
        self._is_complete = False
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_begin": self._header_name.clear,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": self._take_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._take_data,
            "on_part_end": self.close,
            "on_end": self._complete,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def write(self, data: bytes) -> None:
        """The next piece of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from error
        except OSError as error:
            raise RefusedError(
                503, "disk", f"the server cannot store the upload: {error.strerror}", retry_after=RETRY_LATER
            ) from error

    def finish(self) -> tuple[list[Upload], list[str]]:
        """Videos and prompts in order, after the whole body."""
        if not self._is_complete:
            raise _malformed("it ends early")
        try:
            prompts = [prompt.decode() for prompt in self.prompts]
        except UnicodeDecodeError as error:
            raise _malformed("a prompt is no UTF-8") from error
        return self.uploads, prompts

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "UploadParser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(self) -> None:
        self._is_complete = True

    def _begin_part(self) -> None:
        self._disposition.clear()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition.extend(data[start:end])

    def _open_part(self) -> None:
        _, options = parse_options_header(bytes(self._disposition))
        kind = options.get(b"name")
        if kind not in (VIDEOS, PROMPTS):
            raise RefusedError(422, "invalid", "unknown part of the form: send files `videos` and fields `prompts`")
        if len(self.uploads if kind == VIDEOS else self.prompts) == self.limits.max_videos:
            raise RefusedError(422, "invalid", f"at most {self.limits.max_videos} videos are taken in a request")
        if kind == PROMPTS:
            self.prompts.append(bytearray())
            return
        place = len(self.uploads)
        path = self.folder / f"video_{place}"
        self._file = path.open("xb")
        name = options.get(b"filename", b"").decode(errors="replace")
        self.uploads.append(Upload(str(path), f"videos[{place}] {name}".rstrip()))

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        prompt = self.prompts[-1]
        if len(prompt) + end - start > BYTES_PER_CHARACTER * self.limits.max_prompt_chars:
            raise RefusedError(422, "invalid", f"a prompt is over {self.limits.max_prompt_chars} characters")
        prompt.extend(data[start:end])


def _malformed(reason: str) -> RefusedError:
    return RefusedError(400, "invalid", f"the multipart body is malformed: {reason}")
