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
from pathlib import Path
from urllib.parse import urlsplit

RETRIED_STATUSES = (429, 502, 503, 504)
CONNECTION_ERRORS = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
CONNECT_SECONDS = 30.0
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Notice within two minutes that the other machine is gone; a live one may be silent for longer."""
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
Body = list[bytes | Path]
"""Pieces of a request's body; of a path the file's content."""


@dataclass(frozen=True)
class RewardClient:
    """A server, and how to retry. It can be shared between threads, and pickled.

    `url`: `http(s)://host:port`, perhaps with a path before `/v1/score`. `timeout`: seconds of silence on a
    connection; scoring counts, so it must exceed the longest wait in the server's queue. `num_retries`: per request,
    after connection errors, 429, 502, 503 and 504, with pauses that double from `first_pause` to `longest_pause`
    seconds, or longer where the server's Retry-After says so. The defaults retry for 3 to 5 minutes. `batch_size`:
    videos per request. `num_connections`: simultaneous requests.
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
        scores: dict[int, Score] = {}

        def score(batch: list[int]) -> list[Score]:
            return self._score_batch([videos[index] for index in batch], [prompts[index] for index in batch])

        with ThreadPoolExecutor(self.num_connections) as pool:
            for batch, results in zip(batches, pool.map(score, batches), strict=True):
                scores.update(zip(batch, results, strict=True))
        return [scores[index] for index in range(len(videos))]

    def is_ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            return self._send("GET", "/health", [], {})[0] == 200
        except _TroubleError:
            return False

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Wait for a server that starts. Raises RewardServerError when it is not ready in time."""
        end = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > end:
                raise RewardServerError(f"{self.url} is not ready after {seconds:g} s")
            time.sleep(min(1.0, self.longest_pause))

    def _batches(self, videos: Sequence[Video], *, on_server: bool) -> Iterator[list[int]]:
        """Indices of videos of one kind."""
        indices = [index for index, video in enumerate(videos) if isinstance(video, ServerPath) == on_server]
        for start in range(0, len(indices), self.batch_size):
            yield indices[start : start + self.batch_size]

    def _score_batch(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[Score]:
        """Videos of one kind."""
        if isinstance(videos[0], ServerPath):
            request = {"videos": [{"path": str(video)} for video in videos], "prompts": prompts}
            reply = self._retry("/v1/score", [json.dumps(request).encode()], "application/json")
        else:
            boundary = uuid.uuid4().hex
            body = _build_form(videos, prompts, boundary)
            reply = self._retry("/v1/score/upload", body, f"multipart/form-data; boundary={boundary}")
        return _read_scores(reply, len(videos))

    def _retry(self, route: str, body: Body, content_type: str) -> bytes:
        """The body of a reply with status 200."""
        start, pause = time.monotonic(), self.first_pause
        for retries_left in reversed(range(self.num_retries + 1)):
            try:
                return self._post(route, body, content_type)
            except _TroubleError as error:
                trouble = error
            if retries_left:
                seconds = max(pause * random.uniform(0.5, 1.0), trouble.retry_after * random.uniform(1.0, 1.5))
                logger.warning("%s%s: %s; again in %.1f s", self.url, route, trouble, seconds)
                time.sleep(seconds)
                pause = min(2 * pause, self.longest_pause)
        attempts = f"{self.num_retries + 1} attempts in {time.monotonic() - start:.0f} s"
        raise RewardServerError(f"{self.url}{route}: gave up after {attempts}: {trouble}", trouble.status)

    def _post(self, route: str, body: Body, content_type: str) -> bytes:
        """One attempt. Raises _TroubleError where another may help, else RewardServerError."""
        length = sum(piece.stat().st_size if isinstance(piece, Path) else len(piece) for piece in body)
        headers = {"Content-Type": content_type, "Content-Length": str(length)}
        status, answer, retry_after = self._send("POST", route, body, headers)
        if status == 200:
            return answer
        try:
            text = str(json.loads(answer)["error"])
        except (ValueError, KeyError, TypeError):
            text = answer[:200].decode(errors="replace")
        if status in RETRIED_STATUSES:
            raise _TroubleError(f"status {status}: {text}", status, retry_after)
        raise RewardServerError(f"{self.url}{route}: status {status}: {text}", status)

    def _send(self, method: str, route: str, body: Body, headers: dict[str, str]) -> tuple[int, bytes, float]:
        """One exchange on a new connection: status, body and Retry-After. Raises _TroubleError."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=min(CONNECT_SECONDS, self.timeout))
        if self.token is not None:
            headers = {**headers, "Authorization": f"Bearer {self.token.strip()}"}
        try:
            _connect(connection, self.timeout)
            return _exchange(connection, method, parts.path.rstrip("/") + route, body, headers)
        finally:
            connection.close()


class _TroubleError(Exception):
    """An attempt that failed for now: the connection (`status` is None), or a reply that says so."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def _build_form(videos: Sequence[str | os.PathLike | bytes], prompts: Sequence[str], boundary: str) -> Body:
    """A multipart form; each attempt reads the files again."""
    parts: list[tuple[str, bytes | Path]] = []
    for index, video in enumerate(videos):
        content = video if isinstance(video, bytes) else Path(video)
        name = content.name if isinstance(content, Path) else f"{index}.mp4"
        parts.append((f'name="videos"; filename="{_quote(name)}"', content))
    parts += [('name="prompts"', prompt.encode()) for prompt in prompts]
    body: Body = []
    for disposition, content in parts:
        head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
        body += [head.encode(), content, b"\r\n"]
    return [*body, f"--{boundary}--\r\n".encode()]


def _read(body: Body) -> Iterator[bytes]:
    for piece in body:
        if isinstance(piece, Path):
            with piece.open("rb") as file:
                while data := file.read(PIECE):
                    yield data
        else:
            yield piece


def _connect(connection: http.client.HTTPConnection, timeout: float) -> None:
    try:
        connection.connect()
        connection.sock.settimeout(timeout)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError as error:
        raise _TroubleError(f"no connection: {error}") from error


def _exchange(connection, method: str, path: str, body: Body, headers) -> tuple[int, bytes, float]:
    """Raises _TroubleError. A refusal that comes before the whole request was sent is an answer too."""
    try:
        try:
            connection.request(method, path, body=_read(body) if body else None, headers=headers)
        except ConnectionError:
            logger.debug("the server closed the connection early")
        response = connection.getresponse()
        answer = response.read()
    except CONNECTION_ERRORS as error:
        raise _TroubleError(f"connection lost: {type(error).__name__}: {error}") from error
    retry_after = response.headers.get("Retry-After", "")
    return response.status, answer, float(retry_after) if retry_after.isdecimal() else 0.0


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


def _quote(name: str) -> str:
    """A file name within quotes, as browsers write it."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
