"""What the reward server takes, how it refuses the rest, and the body of a request within these limits."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

MEGABYTE = 1 << 20
MAX_JSON_BYTES = 4 * MEGABYTE
"""A JSON body is held in memory."""
RETRY_SOON, RETRY_LATER = 2, 10
"""Seconds of Retry-After: while others are served, and while the server starts or stops."""


class RefusedError(Exception):
    """An answer other than 200: its status, the reason it is counted under, and what to tell the client."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


@dataclass(frozen=True)
class ServerLimits:
    """`max_body_mb`: of an upload. `max_videos`, `max_prompt_chars`: of one request. `max_queue`: videos that wait.

    `max_gigapixels`: of one video, all its frames together; a minute of 1080p at 24 a second has 3.
    `max_receiving`: bodies on their way at a time. `body_timeout`: seconds for the whole of one, however it trickles.
    """

    max_body_mb: float = 256
    max_videos: int = 64
    max_prompt_chars: int = 8000
    max_queue: int = 1024
    max_receiving: int = 128
    body_timeout: float = 120.0
    max_gigapixels: float = 4.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.max_videos > self.max_queue:
            raise ValueError(
                f"max_videos={self.max_videos} would never fit max_queue={self.max_queue}: raise max_queue"
            )

    @property
    def max_body_bytes(self) -> int:
        """Of an upload."""
        return int(self.max_body_mb * MEGABYTE)

    def check_request(self, num_videos: int, prompts: list[str]) -> None:
        """Raise RefusedError unless there is a prompt for each video, and neither too many nor too long ones."""
        if num_videos != len(prompts) or not num_videos:
            raise RefusedError(
                422, "invalid", f"{num_videos} video(s) and {len(prompts)} prompt(s): give one for each"
            )
        if num_videos > self.max_videos:
            raise RefusedError(
                422, "invalid", f"{num_videos} videos in a request, at most {self.max_videos} are taken"
            )
        longest = max(map(len, prompts))
        if longest > self.max_prompt_chars:
            raise RefusedError(
                422, "invalid", f"a prompt of {longest} characters, at most {self.max_prompt_chars} may be"
            )


class BodyReceiver:
    """Receives bodies within their limits, so many at a time; `interrupt` ends those under way."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self._deadlines: set[asyncio.Timeout] = set()
        self._is_stopping = False

    async def receive(self, request: Request, consume: Callable[[bytes], object], *, max_bytes: int) -> None:
        """Give the body to `consume` piece by piece. Raises RefusedError, or starlette's ClientDisconnect."""
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise _too_large(max_bytes)
        if len(self._deadlines) >= self.limits.max_receiving:
            raise RefusedError(503, "too_many_bodies", "too many requests are being received", retry_after=RETRY_SOON)
        deadline = asyncio.timeout(self.limits.body_timeout)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                await self._stream(request, consume, max_bytes)
        except TimeoutError as error:
            raise self._out_of_time() from error
        finally:
            self._deadlines.discard(deadline)

    def interrupt(self) -> None:
        """Refuse what has not arrived yet: the server stops. Call it in the event loop."""
        self._is_stopping = True
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)

    async def _stream(self, request: Request, consume: Callable[[bytes], object], max_bytes: int) -> None:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            consume(piece)

    def _out_of_time(self) -> RefusedError:
        if self._is_stopping:
            return RefusedError(503, "stopping", "the server is stopping", retry_after=RETRY_LATER)
        return RefusedError(408, "slow_body", f"the body did not arrive within {self.limits.body_timeout:g} s")


def _too_large(max_bytes: int) -> RefusedError:
    return RefusedError(
        413, "body_too_large", f"the body is over {max_bytes} bytes; send fewer or smaller videos a request"
    )
