"""The reward client against servers that misbehave, and that it needs nothing but Python."""

import json
import pickle
import random
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import reward_client
from reward_client import RewardClient, RewardServerError, Score, ServerPath

QUICK = {"first_pause": 0.01, "longest_pause": 0.05, "timeout": 5.0}
SCORED = {"reward": 1.5, "cot": "good", "num_tokens": 2, "is_finished": True}


def reply(status: int, content: object, **headers: object) -> bytes:
    """The bytes of an answer."""
    body = json.dumps(content).encode()
    fields = {"Content-Length": len(body), "Connection": "close", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode() + body


ONE = reply(200, {"results": [SCORED], "model": "m"})
FULL = reply(503, {"error": "the queue is full"})


class FakeServer(socketserver.TCPServer):
    """Answers one connection after another with the next of `acts`; the last one is repeated.

    Acts: bytes to send after the request was read, or a function of the connection.
    """

    allow_reuse_address = True

    def __init__(self, *acts: bytes | Callable[[socket.socket], object], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), None)
        self.acts, self.requests = list(acts), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def finish_request(self, connection: socket.socket, _) -> None:
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        self.requests.append(read_request(connection) if isinstance(act, bytes) else b"")
        connection.sendall(act) if isinstance(act, bytes) else act(connection)


def read_request(connection: socket.socket) -> bytes:
    """Head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < sum(lengths):
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def reset(connection: socket.socket) -> None:
    """Close without an answer, by a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stay_silent(connection: socket.socket) -> None:
    read_request(connection)
    time.sleep(0.5)


@pytest.fixture
def server() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers."""
    with ExitStack() as stack:

        def start(*acts, **options) -> FakeServer:
            fake = stack.enter_context(FakeServer(*acts, **options))
            stack.callback(fake.shutdown)
            return fake

        yield start


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Seconds slept, which pass at once."""
    slept: list[float] = []
    monkeypatch.setattr(reward_client.time, "sleep", slept.append)
    return slept


def test_trouble_is_survived(server):
    """A reset, a close after the request, no HTTP, a truncated answer, a full queue, a proxy's error, silence."""
    trouble = [reset, read_request, b"no http\r\n\r\n", ONE[:-10], FULL, reply(502, "a proxy's"), stay_silent]
    fake = server(*trouble, ONE)
    assert RewardClient(fake.url, **{**QUICK, "timeout": 0.2}).score([b"a"], ["b"]) == [Score(**SCORED)]
    assert fake.acts == [ONE]


def test_a_server_that_is_away_for_a_while_is_waited_for(server):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    client = RewardClient(f"http://127.0.0.1:{port}", **QUICK, num_retries=100)
    assert not client.is_ready()
    with pytest.raises(RewardServerError, match=r"not ready after 0.1 s"):
        client.wait_until_ready(0.1)
    timer = threading.Timer(0.3, lambda: server(ONE, port=port))
    timer.start()
    assert client.score([ServerPath("/a")], ["b"]) == [Score(**SCORED)]
    timer.join()
    client.wait_until_ready(20)


def test_it_gives_up_and_says_what_was_wrong(server):
    fake = server(FULL)
    with pytest.raises(RewardServerError, match=r"gave up after 4 attempts.*the queue is full") as caught:
        RewardClient(fake.url, **QUICK, num_retries=3).score([b"a"], ["b"])
    assert (caught.value.status, len(fake.requests)) == (503, 4)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_refusal_for_good_is_not_retried(server, status, pauses):
    fake = server(reply(status, {"error": "no"}))
    with pytest.raises(RewardServerError, match=f"status {status}: no") as caught:
        RewardClient(fake.url, **QUICK).score([b"a"], ["b"])
    assert (caught.value.status, len(fake.requests), pauses) == (status, 1, [])


def test_pauses_double_up_to_the_longest_differ_between_clients_and_honour_retry_after(server, pauses):
    random.seed(0)
    fake = server(*[FULL] * 8, reply(503, {"error": "full"}, Retry_After="30"), ONE)
    RewardClient(fake.url, first_pause=1.0, longest_pause=20.0).score([b"a"], ["b"])
    shares = [pause / longest for pause, longest in zip(pauses, [1, 2, 4, 8, 16, 20, 20, 20, 45], strict=True)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) == 9
    assert 30 <= pauses[-1] <= 45


def answer_by_prompt(connection: socket.socket) -> None:
    """Each reward is the number that its prompt is."""
    head, _, body = read_request(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /behind/v1/score")
    assert b"Authorization: Bearer secret" in head
    if b"/upload" in head:
        parts = body.split(b"--" + head.partition(b"boundary=")[2].split(b"\r\n")[0])
        prompts = [part.split(b"\r\n")[3] for part in parts if b'name="prompts"' in part]
    else:
        prompts = json.loads(body)["prompts"]
    results = [{"error": "broken"} if int(p) == 5 else {**SCORED, "reward": float(p), "new": 1} for p in prompts]
    connection.sendall(reply(200, {"results": results, "model": "m"}))


def test_order_is_kept_over_kinds_batches_and_connections(server, tmp_path):
    (tmp_path / 'a "b".mp4').write_bytes(b"file")
    kinds = (ServerPath("/a"), b"bytes", tmp_path / 'a "b".mp4', str(tmp_path / 'a "b".mp4'))
    videos = [kinds[number % 4] for number in range(37)]
    fake = server(answer_by_prompt)
    client = RewardClient(f"{fake.url}/behind/", token=" secret\n", batch_size=3, num_connections=4, **QUICK)
    scores = client.score(videos, [str(number) for number in range(37)])
    assert [score.reward for score in scores] == [None if number == 5 else float(number) for number in range(37)]
    assert scores[5].error == "broken"
    assert len(fake.requests) == 4 + 9
    assert client.score([], []) == []


def test_replies_that_do_not_fit_and_mistakes_of_the_caller_are_errors_at_once(server, pauses):
    for content in ({"results": []}, {"results": [{**SCORED, "reward": None}]}, {"results": [{}]}, {}, 3):
        with pytest.raises(RewardServerError, match="the reply"):
            RewardClient(server(reply(200, content)).url, **QUICK).score([b"a"], ["b"])
    fake = server(ONE)
    client = RewardClient(fake.url, **QUICK)
    with pytest.raises(FileNotFoundError, match="nothing"):
        client.score(["/nothing.mp4"], ["b"])
    with pytest.raises(ValueError, match="2 videos and 1 prompts"):
        client.score([b"a", b"b"], ["b"])
    with pytest.raises(ValueError, match="http://host:port"):
        RewardClient("localhost:8000")
    assert (fake.requests, pauses) == ([], [])


def test_it_can_be_pickled_and_needs_the_standard_library_only():
    client = RewardClient("http://a:1", token="t")
    assert pickle.loads(pickle.dumps(client)) == client
    folder = Path(reward_client.__file__).parent
    subprocess.run([sys.executable, "-S", "-c", "import reward_client"], cwd=folder, check=True)  # no site-packages
