"""The reward client against servers that misbehave, and that it needs nothing but Python."""

import json
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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


class FakeServer:
    """Treats connection after connection as the acts say; the last act is repeated.

    Acts: bytes to send after the request was read, or a function of connection and request.
    """

    def __init__(self, *acts: bytes | Callable[[socket.socket, bytes], None], port: int = 0) -> None:
        self.acts = acts
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            act = self.acts[min(len(self.requests), len(self.acts) - 1)]
            with connection:
                connection.settimeout(5)
                if isinstance(act, bytes):
                    self.requests.append(read_request(connection))
                    connection.sendall(act)
                else:
                    self.requests.append(b"")
                    act(connection)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


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
    """Without an answer, by a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close_after_request(connection: socket.socket) -> None:
    read_request(connection)


def stay_silent(connection: socket.socket) -> None:
    read_request(connection)
    time.sleep(0.5)


ONE = reply(200, {"results": [SCORED], "model": "m"})


@pytest.fixture
def server() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers."""
    started: list[FakeServer] = []

    def start(*acts, **options) -> FakeServer:
        started.append(FakeServer(*acts, **options))
        return started[-1]

    yield start
    for fake in started:
        fake.close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Seconds slept, which pass at once."""
    slept: list[float] = []
    monkeypatch.setattr(reward_client.time, "sleep", slept.append)
    return slept


TROUBLE = {
    "reset": reset,
    "closed": close_after_request,
    "empty": b"",
    "garbage": b"no http at all\r\n\r\n",
    "truncated": ONE[:-10],
    "503": reply(503, {"error": "the queue is full"}),
    "502": reply(502, "a proxy's"),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_is_survived(server, trouble):
    fake = server(trouble, trouble, ONE)
    assert RewardClient(fake.url, **QUICK).score([b"a"], ["b"]) == [Score(**SCORED)]
    assert len(fake.requests) == 3


def test_a_silent_server_is_asked_again(server):
    fake = server(stay_silent, ONE)
    assert RewardClient(fake.url, **{**QUICK, "timeout": 0.2}).score([b"a"], ["b"]) == [Score(**SCORED)]


def test_a_server_that_is_away_for_a_while_is_waited_for(server):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    client = RewardClient(f"http://127.0.0.1:{port}", **QUICK, num_retries=100)
    assert not client.is_ready()
    started = []
    timer = threading.Timer(0.3, lambda: started.append(server(ONE, port=port)))
    timer.start()
    assert client.score([ServerPath("/a")], ["b"]) == [Score(**SCORED)]
    timer.join()


@pytest.mark.parametrize("trouble", [reset, reply(503, {"error": "the queue is full"})], ids=["reset", "503"])
def test_it_gives_up_with_what_was_wrong(server, trouble):
    fake = server(trouble)
    with pytest.raises(RewardServerError) as caught:
        RewardClient(fake.url, **QUICK, num_retries=3).score([b"a"], ["b"])
    expected = "the queue is full" if isinstance(trouble, bytes) else "onnection"  # lost, reset, or none, as it falls
    assert f"{fake.url}/v1/score/upload: gave up after 4 attempts" in str(caught.value)
    assert expected in str(caught.value)
    assert caught.value.status == (503 if isinstance(trouble, bytes) else None)
    assert len(fake.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 413, 500])
def test_a_refusal_for_good_is_not_tried_again(server, status, pauses):
    fake = server(reply(status, {"error": "no"}))
    with pytest.raises(RewardServerError, match=f"status {status}: no") as caught:
        RewardClient(fake.url, **QUICK).score([b"a"], ["b"])
    assert caught.value.status == status
    assert (len(fake.requests), pauses) == (1, [])


def test_pauses_double_up_to_the_longest_and_differ_between_clients(server, pauses):
    random.seed(0)
    fake = server(*[reply(503, {"error": "full"})] * 8, ONE)
    RewardClient(fake.url, first_pause=1.0, longest_pause=20.0).score([b"a"], ["b"])
    for pause, longest in zip(pauses, [1, 2, 4, 8, 16, 20, 20, 20], strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause / longest for pause, longest in zip(pauses, [1, 2, 4, 8, 16, 20, 20, 20], strict=True)}) == 8


@pytest.mark.parametrize(("value", "shortest", "longest"), [("7", 7, 10.5), ("0", 0, 1), ("soon", 0, 1), ("-5", 0, 1)])
def test_retry_after_is_honoured(server, pauses, value, shortest, longest):
    fake = server(reply(503, {"error": "full"}, Retry_After=value), ONE)
    RewardClient(fake.url, first_pause=1.0).score([b"a"], ["b"])
    (pause,) = pauses
    assert shortest <= pause <= longest


def answer_by_prompt(request: bytes) -> bytes:
    """Each reward is the number that its prompt is."""
    head, _, body = request.partition(b"\r\n\r\n")
    if b"/upload" in head:
        prompts = [part.split(b"\r\n")[3] for part in body.split(b"--" + boundary(head)) if b'name="prompts"' in part]
    else:
        prompts = json.loads(body)["prompts"]
    results = [{"error": "broken"} if int(p) == 5 else {**SCORED, "reward": float(p), "new": 1} for p in prompts]
    return reply(200, {"results": results, "model": "m"})


def boundary(head: bytes) -> bytes:
    return head.partition(b"boundary=")[2].split(b"\r\n")[0]


def test_order_is_kept_over_kinds_batches_and_connections(server, tmp_path):
    (tmp_path / 'a "b".mp4').write_bytes(b"file")
    kinds: Sequence = (ServerPath("/a"), b"bytes", tmp_path / 'a "b".mp4', str(tmp_path / 'a "b".mp4'))
    videos = [kinds[number % 4] for number in range(37)]
    fake = server(lambda connection: connection.sendall(answer_by_prompt(read_request(connection))))
    client = RewardClient(fake.url, batch_size=3, num_connections=4, **QUICK)
    scores = client.score(videos, [str(number) for number in range(37)])
    assert [score.reward for score in scores] == [None if number == 5 else float(number) for number in range(37)]
    assert scores[5].error == "broken"
    assert len(fake.requests) == 4 + 9
    assert client.score([], []) == []


def test_what_is_sent(server, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\r\n--" * 1000)
    fake = server(ONE)
    client = RewardClient(f"{fake.url}/behind/", token=" secret\n", **QUICK)
    client.score([ServerPath("/data/a.mp4")], ["p"])
    client.score([tmp_path / "a.mp4"], ["q\u00e9"])
    by_path, upload = fake.requests
    assert by_path.startswith(b"POST /behind/v1/score HTTP/1.1\r\n")
    assert by_path.endswith(b'{"videos": [{"path": "/data/a.mp4"}], "prompts": ["p"]}')
    assert all(b"Authorization: Bearer secret\r\n" in request for request in fake.requests)
    assert b'filename="a.mp4"\r\n\r\n' + b"\0\r\n--" * 1000 + b"\r\n--" in upload
    assert "q\u00e9".encode() in upload


@pytest.mark.parametrize(
    "content", [{"results": []}, {"results": "a"}, {"results": [{**SCORED, "reward": None}]}, {"results": [{}]}, {}, 3]
)
def test_a_reply_that_does_not_fit_is_an_error(server, content):
    fake = server(reply(200, content))
    with pytest.raises(RewardServerError, match="the reply"):
        RewardClient(fake.url, **QUICK).score([b"a"], ["b"])


def test_mistakes_of_the_caller_are_no_trouble_of_the_server(server, pauses):
    fake = server(ONE)
    client = RewardClient(fake.url, **QUICK)
    with pytest.raises(FileNotFoundError, match="nothing"):
        client.score(["/nothing.mp4"], ["b"])
    with pytest.raises(ValueError, match="2 videos and 1 prompts"):
        client.score([b"a", b"b"], ["b"])
    with pytest.raises(ValueError, match="http://host:port"):
        RewardClient("localhost:8000")
    assert (fake.requests, pauses) == ([], [])


def test_waiting_for_a_server_ends(server):
    fake = server(reply(503, {"status": "loading"}), reply(503, {"status": "loading"}), reply(200, {}))
    RewardClient(fake.url, **QUICK).wait_until_ready(20)
    with pytest.raises(RewardServerError, match=r"not ready after 0.1 s"):
        RewardClient("http://127.0.0.1:1", **QUICK).wait_until_ready(0.1)


def test_it_travels_to_workers():
    client = RewardClient("http://a:1", token="t")
    assert pickle.loads(pickle.dumps(client)) == client
    assert isinstance(pickle.loads(pickle.dumps(ServerPath("/a"))), ServerPath)


def test_it_needs_the_standard_library_only():
    folder = Path(reward_client.__file__).parent
    subprocess.run([sys.executable, "-S", "-c", "import reward_client"], cwd=folder, check=True)  # no site-packages
