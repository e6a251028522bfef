"""Decodes videos in processes of their own, so that a damaged or hostile file can only end its own decoder.

decord ends its process when a container announces more frames than memory holds, and with several threads it returns
different frames of a damaged clip each time. A decoder process has one thread, `MEMORY_BYTES` of address space and
`SECONDS` per answer. Whatever ends it is an error of the video that it was decoding; the next video gets a new
process. Each thread that decodes has a process of its own, so that callers choose how many run at a time.
"""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

import numpy as np

MEMORY_BYTES = 4 << 30
MAX_FRAME_PIXELS = 7680 * 4320
SECONDS = 120
BLOCK_BYTES = 64 << 20
"""Frames are returned in blocks of about this size, so that memory does not grow with their number."""
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class VideoError(ValueError):
    """A video that cannot be used: missing, empty, undecodable, too large or too short. The message names the file."""


@dataclass(frozen=True)
class VideoHeader:
    """From a clip's container and first frame: size in pixels, number of frames, frames per second."""

    width: int
    height: int
    total_frames: int
    fps: float

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.total_frames / self.fps


class OpenVideo:
    """A video that a decoder process has open: its `header`, and its frames."""

    def __init__(self, decoder: "_Decoder", path: str) -> None:
        self.path = path
        self._decoder = decoder
        self.header = VideoHeader(*decoder.ask(path, path))
        self._shape = (self.header.height, self.header.width, 3)
        if self.header.width * self.header.height > MAX_FRAME_PIXELS:
            size = f"{self.header.width} x {self.header.height} pixels"
            raise VideoError(f"video frames of {size} are over {MAX_FRAME_PIXELS} pixels; scale it down: {path}")

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these indices in blocks, uint8 [block, height, width, 3]. Raises VideoError."""
        size = max(1, BLOCK_BYTES // int(np.prod(self._shape)))
        for start in range(0, len(indices), size):
            block = [int(index) for index in indices[start : start + size]]
            frames = self._decoder.ask(block, self.path)
            yield np.frombuffer(bytearray(frames), np.uint8).reshape(len(block), *self._shape)


@contextlib.contextmanager
def open_video(path: str | os.PathLike) -> Iterator[OpenVideo]:
    """Open a video in an idle decoder process, or a new one. Raises VideoError that names the file."""
    path = existing_file(path)
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = _Decoder()
    try:
        yield OpenVideo(decoder, path)
    finally:
        if decoder.is_ready:
            _idle.append(decoder)


class _Decoder:
    """A decoder process. It ends when the connection closes, thus with this process at the latest."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        command = [sys.executable, "-P", os.path.abspath(__file__), str(descriptor)]
        self._process = subprocess.Popen(
            command, pass_fds=(descriptor,), env=os.environ | CPU_ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        theirs.close()
        self.is_ready = True

    def ask(self, request: str | list[int], path: str) -> tuple | bytes:
        """The answer to a request about the video `path`. Raises VideoError."""
        self.is_ready = False  # an answer that nobody waits for any more must not be mistaken for the next one
        try:
            self._connection.send(request)
            is_error, answer = self._connection.recv()
            if answer is None:
                answer = self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            self._connection.close()
            raise VideoError(_describe_death(self._process.wait(), path)) from None
        self.is_ready = True
        if is_error:
            raise VideoError(f"video does not decode (truncated or damaged?): {path}: {answer}")
        return answer


_idle: list[_Decoder] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child shares no decoder with its parent


def _describe_death(status: int, path: str) -> str:
    if status == -signal.SIGALRM:
        return f"video takes over {SECONDS} s to decode: {path}"
    return f"video ends its decoder (status {status}; damaged, or over {MEMORY_BYTES >> 30} GiB of memory?): {path}"


def existing_file(path: str | os.PathLike) -> str:
    """The path as text. Raises VideoError unless it names a file that is not empty."""
    path = os.fspath(path)
    try:
        size = os.path.getsize(path) if os.path.isfile(path) else None
    except OSError:  # removed between the two calls
        size = None
    if size is None:
        raise VideoError(f"video not found: {path}")
    if size == 0:
        raise VideoError(f"video is empty (0 bytes): {path}")
    return path


def _serve(connection: Connection) -> None:
    """The decoder process: answers a path with the video's header, and a list of indices with its frames."""
    import decord

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    decord.logging.set_level(decord.logging.FATAL)
    undecodable = (
        decord.DECORDError,
        RuntimeError,  # decord, where it cannot open a file
        AssertionError,  # decord, on a video without frames
        StopIteration,  # decord, where a frame that the file announces is missing
        IndexError,
        ArithmeticError,  # a frame rate of zero
        OSError,  # the file was removed or is not readable
        MemoryError,
    )
    reader = None
    while True:
        request = connection.recv()
        signal.alarm(SECONDS)  # ends this process
        frames = None
        try:
            if isinstance(request, str):
                reader = decord.VideoReader(request, num_threads=1)
                answer = False, _read_header(reader)
            else:
                frames = reader.get_batch(request).asnumpy()
                answer = False, None
        except undecodable as error:
            frames, answer = None, (True, _describe(error))
        connection.send(answer)
        if frames is not None:
            connection.send_bytes(frames.data.cast("B"))
        signal.alarm(0)


def _read_header(reader) -> tuple[int, int, int, float]:
    _, height, width, _ = reader.get_batch([0]).shape
    rate = float(reader.get_avg_fps())
    if not 0 < rate < float("inf"):
        raise ZeroDivisionError(f"it has a frame rate of {rate}")
    return width, height, len(reader), rate


def _describe(error: Exception) -> str:
    text = re.sub(r"^\[[^]]*\] \S+: ", "", str(error).strip())  # decord's time stamp and source line
    return text.splitlines()[0][:200] if text else type(error).__name__


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller decides when to end
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(Connection(int(sys.argv[1])))
