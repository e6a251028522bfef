"""Client of the reward server `serve.py`: this one file, standard library only. Copy it into any training code.

    from reward_client import RewardClient, ServerPath

    client = RewardClient("http://rewards:8000", token=open("token.txt").read())
    scores = client.score(["local.mp4", encoded_mp4_bytes, ServerPath("/data/a.mp4")], ["a cat runs"] * 3)
    rewards = [score.reward for score in scores]

Scoring is greedy and the server keeps no state, so a lost request is simply sent again.
"""

import http.client
import json
import logging
import os
import random
import socket
import ssl
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

RETRIED_STATUSES = (429, 502, 503, 504)
CONNECTION_ERRORS = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
CONNECT_SECONDS = 30.0
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Notices within two minutes that the other machine is gone; a live one may be silent for longer."""
PIECE = 1 << 18

logger = logging.getLogger(__name__)


class RewardServerError(RuntimeError):
    """The server gave no rewards: it refused with `status`, or could not be reached (`status` is None)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerPath(str):
    """A path on the server, below one of its `--roots`; other strings are local files, which are uploaded."""

    __slots__ = ()


@dataclass(frozen=True)
class Score:
    """`reward` after the chain of thought `cot`; or None, with `error`, for a video that cannot be scored."""

    reward: float | None
    cot: str = ""
    num_tokens: int = 0
    is_finished: bool = False
    error: str | None = None


Video = ServerPath | str | os.PathLike | bytes


class _Reply(NamedTuple):
    status: int
    body: bytes
    retry_after: float


@dataclass(frozen=True)
class RewardClient:
    """A server, and how to retry. Safe to share between threads, and to pickle.

    `url`: `http(s)://host:port`, perhaps with a path before `/v1/score`. `timeout`: seconds of silence on a
    connection; scoring counts, so it must exceed the longest wait in the server's queue. `num_retries`: of each
    request, after connection errors, 429, 502, 503 and 504, with pauses that double from `first_pause` to
    `longest_pause` seconds, or longer where the server's Retry-After says so. The defaults try for 3 to 5 minutes.
    `batch_size`: videos in a request. `num_connections`: requests at a time.
    """

    url: str
    token: str | None = None
    timeout: float = 1800.0
    num_retries: int = 14
    first_pause: float = 0.5
    longest_pause: float = 30.0
    batch_size: int = 16
    num_connections: int = 4

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
        batches = [*self._batches(videos, on_server=True), *self._batches(videos, on_server=False)]
        with ThreadPoolExecutor(self.num_connections) as pool:
            results = list(pool.map(lambda batch: self._score_batch(batch, videos, prompts), batches))
        numbers = [number for batch in batches for number in batch]
        scores = [score for of_batch in results for score in of_batch]
        return [score for _, score in sorted(zip(numbers, scores, strict=True), key=itemgetter(0))]

    def is_ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            return self._send("GET", "/health", lambda: None, {}).status == 200
        except _UnreachableError:
            return False

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Wait for a server that starts. Raises RewardServerError when it is not ready in time."""
        end = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > end:
                raise RewardServerError(f"{self.url} is not ready after {seconds:g} s")
            time.sleep(min(1.0, self.longest_pause))

    def _batches(self, videos: Sequence[Video], *, on_server: bool) -> Iterator[list[int]]:
        numbers = [number for number, video in enumerate(videos) if isinstance(video, ServerPath) == on_server]
        for start in range(0, len(numbers), self.batch_size):
            yield numbers[start : start + self.batch_size]

    def _score_batch(self, batch: Sequence[int], videos: Sequence[Video], prompts: Sequence[str]) -> list[Score]:
        """Videos of one kind."""
        of_batch = [prompts[number] for number in batch]
        if isinstance(videos[batch[0]], ServerPath):
            request = {"videos": [{"path": str(videos[number])} for number in batch], "prompts": of_batch}
            body = json.dumps(request).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            reply = self._retry("/v1/score", lambda: iter((body,)), headers)
        else:
            form = _Form([videos[number] for number in batch], of_batch)
            reply = self._retry("/v1/score/upload", form.pieces, form.headers())
        return _read_scores(reply, len(batch))

    def _retry(self, route: str, make_body, headers: dict[str, str]) -> bytes:
        """The body of a reply with status 200."""
        start, pause, problem, status = time.monotonic(), self.first_pause, "", None
        for attempt in range(self.num_retries + 1):
            retry_after = 0.0
            try:
                reply = self._send("POST", route, make_body, headers)
            except _UnreachableError as error:
                problem, status = str(error), None
            else:
                if reply.status == 200:
                    return reply.body
                problem, status, retry_after = _describe(reply), reply.status, reply.retry_after
                if status not in RETRIED_STATUSES:
                    raise RewardServerError(f"{self.url}{route}: {problem}", status)
            if attempt < self.num_retries:
                seconds = max(pause * random.uniform(0.5, 1.0), retry_after * random.uniform(1.0, 1.5))
                logger.warning("%s%s: %s; again in %.1f s", self.url, route, problem, seconds)
                time.sleep(seconds)
                pause = min(2 * pause, self.longest_pause)
        seconds = time.monotonic() - start
        raise RewardServerError(
            f"{self.url}{route}: gave up after {self.num_retries + 1} attempts in {seconds:.0f} s: {problem}", status
        )

    def _send(self, method: str, route: str, make_body, headers: dict[str, str]) -> _Reply:
        """One attempt on a connection of its own. Raises _UnreachableError."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=min(CONNECT_SECONDS, self.timeout))
        if self.token is not None:
            headers = {**headers, "Authorization": f"Bearer {self.token.strip()}"}
        try:
            _connect(connection, self.timeout)
            return _exchange(connection, method, parts.path.rstrip("/") + route, make_body, headers)
        finally:
            connection.close()


class _UnreachableError(OSError):
    """The connection failed, before or during the exchange."""


class _Form:
    """A multipart body that is read from its files anew for each attempt."""

    def __init__(self, videos: Sequence[str | os.PathLike | bytes], prompts: Sequence[str]) -> None:
        self.boundary = uuid.uuid4().hex
        self.parts: list[tuple[bytes, bytes | Path]] = []
        for number, video in enumerate(videos):
            content = video if isinstance(video, bytes) else Path(video)
            name = content.name if isinstance(content, Path) else f"{number}.mp4"
            self.parts.append((self._head(f'name="videos"; filename="{_quote(name)}"'), content))
        self.parts += [(self._head('name="prompts"'), prompt.encode()) for prompt in prompts]
        self.end = f"--{self.boundary}--\r\n".encode()

    def headers(self) -> dict[str, str]:
        """Type and length."""
        length = len(self.end)
        for head, content in self.parts:
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            length += len(head) + size + len(b"\r\n")
        return {"Content-Type": f"multipart/form-data; boundary={self.boundary}", "Content-Length": str(length)}

    def pieces(self) -> Iterator[bytes]:
        """The body."""
        for head, content in self.parts:
            yield head
            if isinstance(content, Path):
                with content.open("rb") as file:
                    while piece := file.read(PIECE):
                        yield piece
            else:
                yield content
            yield b"\r\n"
        yield self.end

    def _head(self, disposition: str) -> bytes:
        return f"--{self.boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()


def _connect(connection: http.client.HTTPConnection, timeout: float) -> None:
    try:
        connection.connect()
        connection.sock.settimeout(timeout)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError as error:
        raise _UnreachableError(f"no connection: {error}") from error


def _exchange(connection: http.client.HTTPConnection, method: str, path: str, make_body, headers) -> _Reply:
    """Raises _UnreachableError. An answer that comes before everything was read, a refusal, counts as one."""
    try:
        try:
            connection.request(method, path, body=make_body(), headers=headers)
        except ConnectionError:
            logger.debug("the server closed the connection early")
        response = connection.getresponse()
        body = response.read()
    except CONNECTION_ERRORS as error:
        raise _UnreachableError(f"connection lost: {type(error).__name__}: {error}") from error
    retry_after = response.headers.get("Retry-After", "")
    return _Reply(response.status, body, float(retry_after) if retry_after.isdecimal() else 0.0)


def _read_scores(body: bytes, num_videos: int) -> list[Score]:
    try:
        scores = [_read_score(result) for result in json.loads(body)["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardServerError(f"the reply is not from a reward server: {body[:200]!r}", 200) from error
    if len(scores) != num_videos:
        raise RewardServerError(f"the reply has {len(scores)} results for {num_videos} videos", 200)
    return scores


def _read_score(result: dict[str, object]) -> Score:
    if "error" in result:
        return Score(None, error=str(result["error"]))
    return Score(float(result["reward"]), result["cot"], result["num_tokens"], result["is_finished"])


def _describe(reply: _Reply) -> str:
    try:
        text = str(json.loads(reply.body)["error"])
    except (ValueError, KeyError, TypeError):
        text = reply.body[:200].decode(errors="replace")
    return f"status {reply.status}: {text}"


def _quote(name: str) -> str:
    """A file name within quotes, as browsers write it."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
