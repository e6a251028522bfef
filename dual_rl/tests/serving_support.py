"""What the tests of the reward server share: a server in a thread, one in a process, and plain HTTP."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest

from scoring.reward_model import RewardModel
from scoring.source import RewardScale
from scoring.types import Outcome, ScoringSettings
from serving.app import RewardService
from serving.limits import ServerLimits
from serving.metrics import ServerMetrics
from serving.paths import AllowedRoots
from serving.scoring_thread import ScoringThread
from serving.server import build_server, choose_port
from training_support import DUAL_RL

CLIPS = sorted((DUAL_RL / "data" / "videos").glob("*.mp4"))
PROMPTS = [f"a shape, number {number}" for number in range(len(CLIPS))]
SECONDS = 30.0
HEADER_SECONDS = 2.0
SETTINGS = ScoringSettings(backend="hf", batch_size=8, max_new_tokens=8, num_threads=1)
TOLERANCE = 1e-4  # of rewards, fp32
BOUNDARY = "sheet"
FORM_HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
UNDER_WAY = ("descore_queue_length", "descore_in_flight")


@dataclass(frozen=True)
class Reply:
    """An answer of the server; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def results(self) -> list[dict]:
        assert self.status == 200, self.body
        return self.json["results"]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll until it holds; fails the test after SECONDS."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
        time.sleep(0.005)


def form_body(videos: Sequence[bytes], prompts: Sequence[str]) -> bytes:
    """A multipart form of uploads."""
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode()
    parts = [head + b'"videos"; filename="clip.mp4"\r\n\r\n' + video + b"\r\n" for video in videos]
    parts += [head + b'"prompts"\r\n\r\n' + prompt.encode() + b"\r\n" for prompt in prompts]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def upload_request(videos: Sequence[bytes], *, token: str = "", num_bytes: int | None = None) -> bytes:
    """The bytes of a request, of its body only the first `num_bytes`."""
    body = form_body(videos, ["a"] * len(videos))
    lines = ["POST /v1/score/upload HTTP/1.1", "Host: here", f"Authorization: Bearer {token}"]
    lines += [f"Content-Type: {FORM_HEADERS['Content-Type']}", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body[:num_bytes]


@dataclass(frozen=True)
class Client:
    """Plain HTTP, a connection for each request."""

    port: int
    token: str | None = None

    def request(self, method: str, route: str, body=None, headers: dict[str, str] | None = None) -> Reply:
        """One exchange; the answer may come before the whole body was sent."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        known = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, route, body, {**known, **(headers or {})})
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, fields, response.read())
        finally:
            connection.close()

    def get(self, route: str) -> Reply:
        return self.request("GET", route)

    def health(self) -> int | None:
        """The status; None while nobody listens."""
        try:
            return self.get("/health").status
        except ConnectionError:
            return None

    def score_paths(self, paths: Sequence[str | Path], prompts: Sequence[str]) -> Reply:
        """Videos on the server."""
        body = json.dumps({"videos": [{"path": str(path)} for path in paths], "prompts": list(prompts)})
        return self.request("POST", "/v1/score", body, {"Content-Type": "application/json"})

    def upload(self, videos: Sequence[bytes], prompts: Sequence[str]) -> Reply:
        """Videos in the request."""
        return self.request("POST", "/v1/score/upload", form_body(videos, prompts), FORM_HEADERS)

    def open(self, sent: bytes) -> socket.socket:
        """A connection on which so much has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        connection.sendall(sent)
        return connection

    def metric(self, name: str) -> float:
        """The value of a sample, labels as in the text."""
        lines = self.get("/metrics").body.decode().splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} "))
        return float(value)

    def num_under_way(self) -> float:
        """Videos that are queued or started."""
        return sum(map(self.metric, UNDER_WAY))


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Gate:
    """Stands before the model's work: closed, nothing becomes ready; `failure` is raised by it."""

    def __init__(self, model: RewardModel) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.failure: Exception | None = None
        self.advance = model.advance

    def __call__(self) -> list[Outcome]:
        assert self.is_open.wait(SECONDS)
        if self.failure is not None:
            raise self.failure
        return self.advance()


class Serving:
    """A real server in a thread, with a model that is there already."""

    def __init__(
        self,
        model: RewardModel,
        folder: Path,
        *,
        roots: Sequence[Path] = (CLIPS[0].parent,),
        token: str | None = None,
        limits: ServerLimits | None = None,
        scale: RewardScale | None = None,
    ) -> None:
        limits, metrics = limits or ServerLimits(), ServerMetrics()
        self.scoring = ScoringThread(lambda: nullcontext(model), max_queue=limits.max_queue, metrics=metrics)
        self.folder = folder
        folder.mkdir()
        service = RewardService(self.scoring, "small", folder, AllowedRoots(roots), limits, metrics, token, scale)
        self.client = Client(choose_port("127.0.0.1", 0), token)
        self.server = build_server(service, "127.0.0.1", self.client.port, header_seconds=HEADER_SECONDS)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.server.serve(),))
        self.scoring.start()
        self.thread.start()
        wait_for(lambda: self.client.health() == 200, "ready")

    def stop(self) -> None:
        """End it; nothing of the uploads may be left."""
        self.scoring.abandon()
        self.loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        self.loop.close()
        self.scoring.join(SECONDS)
        assert not self.scoring.is_alive()
        assert not list(self.folder.iterdir()), "uploads were left behind"

    def wait_for_waiting(self, num_videos: int) -> None:
        """Until so many videos are queued or started."""
        wait_for(lambda: self.client.num_under_way() == num_videos, f"{num_videos} videos under way")


class ServingProcess:
    """`python serve.py` as users start it; its temporary files lie in `root/tmp`."""

    def __init__(self, root: Path, arguments: Sequence[object], *, script: Path = DUAL_RL / "serve.py") -> None:
        self.temporary = root / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.console = root / "console"
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "--port", "0", *map(str, arguments)],
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "PYTHONPATH": str(DUAL_RL)},
            )

    def client(self, token: str | None = None, *, wanted: str = "\nready", seconds: float = 120.0) -> Client:
        """Of the server as soon as it says what is `wanted`."""
        deadline = time.monotonic() + seconds
        while wanted not in self.console.read_text():
            assert self.process.poll() is None, self.console.read_text()
            assert time.monotonic() < deadline, self.console.read_text()
            time.sleep(0.05)
        line = next(line for line in self.console.read_text().splitlines() if line.startswith("listening"))
        return Client(int(line.rpartition(" ")[2]), token)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status; a process that hangs is killed and fails the test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise AssertionError(f"the server hangs:\n{self.console.read_text()}") from error


def assert_scored(results: list[dict], expected: list[dict]) -> None:
    """Results without an error, like those of the offline model."""
    assert [result.get("error") for result in results] == [None] * len(expected)
    assert [result["reward"] for result in results] == pytest.approx([e["reward"] for e in expected], abs=TOLERANCE)
    assert [result["cot"] for result in results] == [e["cot"] for e in expected]
    assert all(result["num_tokens"] == 8 and not result["is_finished"] for result in results)
