"""The reward server in tests: a server in a thread or in a process, and plain HTTP."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import httpx
import pytest

from model_support import CLIPS, DUAL_RL
from serving.app import RewardService
from serving.metrics import ServerMetrics
from serving.requests import AllowedRoots, ServerLimits
from serving.scoring_thread import ScoringThread
from serving.server import build_server, choose_port
from verl.data.vision_process import sample_frames

PROMPTS = [f"a shape, number {number}" for number in range(len(CLIPS))]
SECONDS = 30.0
HEADER_SECONDS = 2.0
TOLERANCE = 1e-4  # of rewards, fp32
UPLOAD = "/v1/score/upload"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def form(videos: Sequence[bytes], prompts: Sequence[str]) -> dict:
    """Arguments of an upload for httpx."""
    return {"files": [("videos", ("clip.mp4", video)) for video in videos], "data": {"prompts": list(prompts)}}


def upload_bytes(videos: Sequence[bytes], *, token: str = "", num_bytes: int | None = None) -> bytes:
    """An upload as it is sent, with only the first `num_bytes` of its body."""
    headers = {"Authorization": f"Bearer {token}"}
    request = httpx.Request("POST", f"http://here{UPLOAD}", headers=headers, **form(videos, ["a"] * len(videos)))
    lines = [f"POST {UPLOAD} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    return "\r\n".join(lines).encode() + request.read()[:num_bytes]


class Client(httpx.Client):
    """Plain HTTP, with a new connection for each request."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, headers = port, {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_keepalive_connections=0)
        super().__init__(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=SECONDS, trust_env=False, limits=limits
        )

    def health(self) -> int | None:
        """The status; None while nobody listens."""
        try:
            return self.get("/health").status_code
        except httpx.TransportError:
            return None

    def score_paths(self, paths: Sequence[str | Path], prompts: Sequence[str] = PROMPTS) -> httpx.Response:
        return self.post("/v1/score", json={"videos": [{"path": str(path)} for path in paths], "prompts": prompts})

    def upload(self, videos: Sequence[bytes], prompts: Sequence[str] = ("a",)) -> httpx.Response:
        return self.post(UPLOAD, **form(videos, prompts))

    def open(self, sent: bytes) -> socket.socket:
        """A connection on which so much has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        connection.sendall(sent)
        return connection

    def metric(self, name: str) -> float:
        """The value of a sample, labels as in the text."""
        (value,) = (line.split()[-1] for line in self.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
        return float(value)

    def num_pending(self) -> float:
        """Videos that are queued or started."""
        return self.metric("descore_queue_length") + self.metric("descore_in_flight")


def results(reply: httpx.Response) -> list[dict]:
    assert reply.status_code == 200, reply.text
    return reply.json()["results"]


def assert_scored(scored: list[dict], expected: list[dict]) -> None:
    """Results without an error, like those of the offline model."""
    assert [result.get("error") for result in scored] == [None] * len(expected)
    assert [result["reward"] for result in scored] == pytest.approx([e["reward"] for e in expected], abs=TOLERANCE)
    assert [result["cot"] for result in scored] == [e["cot"] for e in expected]
    assert all(result["num_tokens"] == 8 and not result["is_finished"] for result in scored)


def assert_busy(reply: httpx.Response, seconds: int) -> None:
    """Refused for now, with the time after which a client may ask again."""
    assert (reply.status_code, reply.headers["retry-after"]) == (503, str(seconds))


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Serving:
    """A real server in a thread, around a loaded model."""

    def __init__(self, model, folder: Path, *, roots=(CLIPS[0].parent,), token=None, limits=None, **options) -> None:
        limits, metrics = limits or ServerLimits(), ServerMetrics()
        self.scoring = ScoringThread(lambda: nullcontext(model), max_queue=limits.max_queue, metrics=metrics)
        self.folder = folder
        folder.mkdir()
        sample = partial(sample_frames, budget=model.loader.budget, size_factor=model.builder.size_factor)
        allowed = AllowedRoots(roots)
        service = RewardService(self.scoring, "small", folder, allowed, limits, metrics, sample, token, **options)
        self.client = Client(choose_port("127.0.0.1", 0), token)
        self.server = build_server(service, "127.0.0.1", self.client.port, header_seconds=HEADER_SECONDS)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.server.serve(),))
        self.scoring.start()
        self.thread.start()
        wait_for(lambda: self.client.health() == 200, "ready")

    def stop(self) -> None:
        """End it; no upload may be left."""
        self.scoring.abandon()
        self.loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(SECONDS)
        self.scoring.join(SECONDS)
        assert not self.thread.is_alive()
        assert not self.scoring.is_alive()
        self.loop.close()
        assert not list(self.folder.iterdir()), "uploads were left behind"

    def wait_for_pending(self, num_videos: int) -> None:
        wait_for(lambda: self.client.num_pending() == num_videos, f"{num_videos} videos queued or started")


class ServingProcess:
    """`python serve.py` as users start it; its temporary files lie in `root/tmp`."""

    def __init__(self, root: Path, arguments: Sequence[object], **options: object) -> None:
        self.temporary, self.console = root / "tmp", root / "console"
        self.temporary.mkdir(parents=True, exist_ok=True)
        variables = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "PYTHONPATH": str(DUAL_RL)}
        command = [sys.executable, DUAL_RL / "serve.py", "--port", "0", *map(str, arguments)]
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                command, stdout=console, stderr=subprocess.STDOUT, env=os.environ | variables, **options
            )

    def client(self, token: str | None = None, *, wanted: str = "\nready") -> Client:
        """Of the server as soon as it says what is `wanted`."""
        wait_for(lambda: wanted in self.console.read_text() or self.process.poll() is not None, wanted, 300)
        assert self.process.poll() is None, self.console.read_text()
        line = next(line for line in self.console.read_text().splitlines() if line.startswith("listening"))
        return Client(int(line.rpartition(" ")[2]), token)

    def assert_ends(self, status: int, *, seconds: float = SECONDS) -> None:
        """With this exit status, and without a file left."""
        try:
            assert self.process.wait(seconds) == status, self.console.read_text()
        finally:
            self.process.kill()
        assert not list(self.temporary.iterdir())
