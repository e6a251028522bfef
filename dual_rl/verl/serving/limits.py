"""What the reward server accepts, and how it refuses the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException

MEGABYTE = 1 << 20
RETRY_SOON, RETRY_LATER = 2, 10
"""Seconds of Retry-After: while others are served, and while the server starts or stops."""


class RefusedError(HTTPException):
    """An answer other than 200: its status, the reason in the metrics, and the message for the client."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.reason = reason

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class ServerLimits:
    """`max_body_mb`: of an upload. `max_videos`, `max_prompt_chars`: of one request. `max_queue`: videos that wait.

    `max_receiving`: bodies on their way at a time. `body_timeout`: seconds for the whole of one.
    """

    max_body_mb: float = 256
    max_videos: int = 64
    max_prompt_chars: int = 8000
    max_queue: int = 1024
    max_receiving: int = 128
    body_timeout: float = 120.0

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

    def check_request(self, num_videos: int, prompts: Sequence[str]) -> None:
        """Raise RefusedError unless there is a prompt for each video, and neither too many nor too long ones."""
        if num_videos != len(prompts) or not num_videos:
            message = f"{num_videos} video(s) and {len(prompts)} prompt(s); give one prompt for each video"
        elif num_videos > self.max_videos:
            message = f"{num_videos} videos in a request; send at most {self.max_videos}"
        elif (longest := max(map(len, prompts))) > self.max_prompt_chars:
            message = f"a prompt has {longest} characters; send at most {self.max_prompt_chars}"
        else:
            return
        raise RefusedError(422, "invalid", message)
