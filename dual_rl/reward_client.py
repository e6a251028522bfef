"""Client of the reward server `serve.py`: this one file, standard library only. Copy it into any training code.

    from reward_client import RewardClient, ServerPath

    client = RewardClient("http://rewards:8000", token=open("token.txt").read())
    scores = client.score(["local.mp4", encoded_mp4_bytes, ServerPath("/data/a.mp4")], ["a cat runs"] * 3)
    rewards = [score.reward for score in scores]

Scores depend on nothing but video, prompt and server, which keeps no state, so a lost request is simply sent again.
"""

import http.client
import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

RETRIED_STATUSES = (None, 429, 502, 503, 504)
"""None: the connection failed."""
CONNECT_SECONDS = 30.0
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Notice within two minutes that the other machine is gone; a live one may be silent for longer."""

logger = logging.getLogger(__name__)


class RewardServerError(RuntimeError):
    """The server gave no rewards: it refused with `status`, or could not be reached (`status` is None).

    `retry_after`: seconds that the server wants to be left alone.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class ServerPath(str):
    """A path on the server, below one of its `--roots`; other strings are local files, which are uploaded."""

    __slots__ = ()


@dataclass(frozen=True)
class Score:
    """`reward` after the chain of thought `cot`; or None, with `error`, for a video that cannot be scored.

    Of several thoughts the reward is the mean, with its `standard_error`; `thoughts` are as the server sends them.
    """

    reward: float | None
    cot: str = ""
    num_tokens: int = 0
    is_finished: bool = False
    error: str | None = None
    standard_error: float | None = None
    thoughts: Sequence[dict] = ()


Video = ServerPath | str | os.PathLike | bytes


@dataclass(frozen=True)
class RewardClient:
    """A server, and how to retry. It can be shared between threads, and pickled.

    `url`: `http(s)://host:port`, perhaps with a path before `/v1/score`. `timeout`: seconds of silence on a
    connection; scoring counts, so it must exceed the longest wait in the server's queue. `num_retries`: per request,
    after connection errors, 429, 502, 503 and 504, with pauses that double from `first_pause` to `longest_pause`
    seconds, or longer where the server's Retry-After says so. The defaults retry for 3 to 5 minutes. `batch_size`:
    videos per request. `num_connections`: simultaneous requests. `num_thoughts`: drawn for each video, 1 for a greedy
    one; None for what the server was started with. `run`: a name under which the server watches what it scores for
    signs of reward hacking.
    """

    url: str
    token: str | None = None
    timeout: float = 1800.0
    num_retries: int = 14
    first_pause: float = 0.5
    longest_pause: float = 30.0
    batch_size: int = 16
    num_connections: int = 4
    num_thoughts: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; give http://host:port")
        if self.batch_size < 1 or self.num_connections < 1 or self.num_retries < 0:
            raise ValueError("batch_size and num_connections must be at least 1, num_retries at least 0")

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[Score]:
        """Scores in order.

        `videos`: a `ServerPath`, the path of a local file, or the bytes of a file (encoded video, not frames).
        `prompts`: what each was generated from. Raises RewardServerError when retries are used up or the server
        refuses, and OSError for local files that cannot be read.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos and {len(prompts)} prompts; give one prompt for each video")
        batches = []
        for is_path in (True, False):
            indices = [index for index, video in enumerate(videos) if isinstance(video, ServerPath) == is_path]
            batches += [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        scores: dict[int, Score] = {}

        def score(batch: list[int]) -> list[Score]:
            return self._score_batch([videos[index] for index in batch], [prompts[index] for index in batch])

        with ThreadPoolExecutor(self.num_connections) as pool:
            for batch, results in zip(batches, pool.map(score, batches), strict=True):
                scores.update(zip(batch, results, strict=True))
        return [scores[index] for index in range(len(videos))]

    def reward(
        self,
        video_paths: Sequence[Video],
        prompts: Sequence[str],
        fps=None,
        num_frames=None,
        max_pixels=None,
        use_norm=True,
    ) -> list[dict[str, float]]:
        """As DanceGRPO calls its scorer, VideoAlign's: the one reward under each of the names that it reads.

        Frames are taken, and rewards scaled, as the server does: the other arguments are not read. Raises
        RewardServerError if a video has no reward.
        """
        scores = self.score(video_paths, prompts)
        if errors := [score.error for score in scores if score.error is not None]:
            raise RewardServerError("\n".join(["videos could not be scored", *errors]))
        return [dict.fromkeys(("VQ", "MQ", "TA", "Overall"), score.reward) for score in scores]

    def is_ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            self._send("GET", "/health")
        except RewardServerError:
            return False
        return True

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Wait for a server that starts. Raises RewardServerError when it is not ready in time."""
        end = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > end:
                raise RewardServerError(f"{self.url} is not ready after {seconds:g} s")
            time.sleep(min(1.0, self.longest_pause))

    def _score_batch(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[Score]:
        """Videos of one kind."""
        if isinstance(videos[0], ServerPath):
            request = {"videos": [{"path": str(video)} for video in videos], "prompts": prompts}
            reply = self._retry("/v1/score", json.dumps(request).encode(), "application/json")
        else:
            boundary = uuid.uuid4().hex
            form = _build_form(videos, prompts, boundary)
            reply = self._retry("/v1/score/upload", form, f"multipart/form-data; boundary={boundary}")
        return _read_scores(reply, len(videos))

    def _retry(self, route: str, body: bytes, content_type: str) -> bytes:
        """The body of a reply with status 200."""
        asked = {"num_thoughts": self.num_thoughts, "run": self.run}
        if query := urlencode({name: value for name, value in asked.items() if value is not None}):
            route += f"?{query}"
        start, pause = time.monotonic(), self.first_pause
        for retries_left in reversed(range(self.num_retries + 1)):
            try:
                return self._send("POST", route, body, {"Content-Type": content_type})
            except RewardServerError as error:
                if error.status not in RETRIED_STATUSES:
                    raise
                last = error
            if retries_left:
                seconds = max(pause * random.uniform(0.5, 1.0), last.retry_after * random.uniform(1.0, 1.5))
                logger.warning("%s; again in %.1f s", last, seconds)
                time.sleep(seconds)
                pause = min(2 * pause, self.longest_pause)
        attempts = f"{self.num_retries + 1} attempts in {time.monotonic() - start:.0f} s"
        raise RewardServerError(f"{self.url}{route}: gave up after {attempts}: {last}", last.status)

    def _send(self, method: str, route: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """One attempt on a new connection: the body of a reply with status 200. Raises RewardServerError."""
        parts, headers = urlsplit(self.url), dict(headers or {})
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=min(CONNECT_SECONDS, self.timeout))
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token.strip()}"
        try:
            connection.connect()
            _configure(connection.sock, self.timeout)
            try:
                connection.request(method, parts.path.rstrip("/") + route, body=body, headers=headers)
            except ConnectionError:
                logger.debug("the server closed the connection early")  # a refusal may be there to read
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            message = f"{self.url}{route}: connection lost: {type(error).__name__}: {error}"
            raise RewardServerError(message) from error
        finally:
            connection.close()
        if response.status == 200:
            return answer
        try:
            text = str(json.loads(answer)["error"])
        except (ValueError, KeyError, TypeError):
            text = answer[:200].decode(errors="replace")
        retry_after = response.headers.get("Retry-After", "")
        seconds = float(retry_after) if retry_after.isdecimal() else 0.0
        raise RewardServerError(f"{self.url}{route}: status {response.status}: {text}", response.status, seconds)


def _configure(connection: socket.socket, timeout: float) -> None:
    connection.settimeout(timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _build_form(videos: Sequence[str | os.PathLike | bytes], prompts: Sequence[str], boundary: str) -> bytes:
    """A multipart form with the files' content."""
    parts: list[tuple[str, bytes]] = []
    for index, video in enumerate(videos):
        is_content = isinstance(video, bytes)
        name = f"{index}.mp4" if is_content else Path(video).name
        for mark, code in (('"', "%22"), ("\r", "%0D"), ("\n", "%0A")):  # as browsers write it
            name = name.replace(mark, code)
        parts.append((f'name="videos"; filename="{name}"', video if is_content else Path(video).read_bytes()))
    parts += [('name="prompts"', prompt.encode()) for prompt in prompts]
    pieces = [
        f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    ]
    return b"".join([*pieces, f"--{boundary}--\r\n".encode()])


def _read_scores(body: bytes, num_videos: int) -> list[Score]:
    try:
        scores = [
            Score(None, error=str(result["error"]))
            if "error" in result
            else Score(
                float(result["reward"]),
                *(result[name] for name in ("cot", "num_tokens", "is_finished")),
                standard_error=result.get("standard_error"),
                thoughts=result.get("thoughts", ()),
            )
            for result in json.loads(body)["results"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardServerError(f"the reply is not from a reward server: {body[:200]!r}", 200) from error
    if len(scores) != num_videos:
        raise RewardServerError(f"the reply has {len(scores)} results for {num_videos} videos", 200)
    return scores
