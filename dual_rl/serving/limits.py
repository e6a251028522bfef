"""What the reward server accepts, and how it refuses the rest."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException

MEGABYTE = 1 << 20
RETRY_SOON, RETRY_LATER = 2, 10
"""Seconds of Retry-After: while others are served, and while the server starts or stops."""


class RefusedError(HTTPException):
    """An answer other than 200: its status, the reason in the metrics, and the message for the client."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(status, message, {} if retry_after is None else {"Retry-After": str(retry_after)})
        self.reason = reason


def _limit(default: float, text: str) -> float:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServerLimits:
    """Each is a flag of serve.py."""

    max_body_mb: float = _limit(256.0, "of one upload")
    max_videos: int = _limit(64, "of one request")
    max_prompt_chars: int = _limit(8000, "of one prompt")
    max_queue: int = _limit(1024, "videos that wait; more are refused with 503")
    max_receiving: int = _limit(128, "bodies on their way at a time")
    body_timeout: float = _limit(120.0, "seconds for the whole of a body")

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            if not 0 < getattr(self, limit.name) < math.inf:
                raise ValueError(f"{limit.name} is {getattr(self, limit.name)}; it must be positive")
        if self.max_videos > self.max_queue:
            raise ValueError(f"max_videos={self.max_videos} is over max_queue={self.max_queue}; raise max_queue")

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
