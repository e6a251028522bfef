"""The client of a chat server, against a real server that fails in every way."""

import threading
import time

import pytest

from cot_support import DROP, ChatServer, completion
from infer_utils.chat_client import ChatClient, RequestError, ServerError

pytest_plugins = ["cot_fixtures"]
GOOD = (200, completion("fine"))
BODY = b"{}"


def make_client(server: ChatServer, **options: float) -> ChatClient:
    return ChatClient(server.url, **{"timeout": 5.0, "first_pause": 0.001, "longest_pause": 0.002, **options})


def answer_in_turn(server: ChatServer, *answers) -> None:
    """Give these answers, the last again and again."""
    server.answer = lambda _: answers[min(len(server.requests), len(answers)) - 1]


@pytest.mark.parametrize("trouble", [DROP, (429, {}), (500, {}), (502, b"<html>"), (503, {}), (504, {}), (408, {})])
def test_what_may_pass_is_tried_again(server, trouble):
    answer_in_turn(server, trouble, trouble, GOOD)
    assert make_client(server).complete(BODY) == GOOD[1]
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", [DROP, (429, {"error": {"message": "slow down"}}), (503, {})])
def test_server_that_stays_busy_ends_the_run(server, trouble):
    answer_in_turn(server, trouble)
    with pytest.raises(ServerError, match="gave up after 6 attempts"):
        make_client(server, num_retries=5).complete(BODY)
    assert len(server.requests) == 6


def test_request_that_breaks_the_server_is_given_up_soon(server):
    answer_in_turn(server, (500, {"error": {"message": "engine error"}}))
    with pytest.raises(RequestError, match="3 attempts: status 500: engine error"):
        make_client(server).complete(BODY)


def test_silence_is_the_requests_failure(server):
    server.answer = lambda _: time.sleep(0.5) or GOOD
    with pytest.raises(RequestError, match=r"no reply for 0\.05 s"):
        make_client(server, timeout=0.05, num_retries=1).complete(BODY)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, RequestError, "status 400: too long"),
        (413, RequestError, "status 413: too long"),
        (422, RequestError, "status 422: too long"),
        (401, ServerError, "--api_key_file"),
        (403, ServerError, "--api_key_file"),
        (404, ServerError, "check --model"),
    ],
)
def test_refusal_is_not_insisted_upon(server, status, error, message):
    answer_in_turn(server, (status, {"error": {"message": "too \n long"}}))
    with pytest.raises(error, match=message):
        make_client(server).complete(BODY)
    assert len(server.requests) == 1


def test_retry_after_is_honoured(server):
    answer_in_turn(server, (429, {}, {"Retry-After": "1"}), GOOD)
    begin = time.monotonic()
    make_client(server).complete(BODY)
    assert time.monotonic() - begin >= 1.0


def test_models_key_and_a_server_without_list(server):
    client = make_client(server)
    assert client.find_models() == {"judge": {"id": "judge", "max_model_len": 4096}}
    assert server.keys == {None}
    ChatClient(server.url, api_key="secret").find_models()
    assert server.keys == {None, "Bearer secret"}
    for answer in ((404, {"detail": "Not Found"}), (200, b"<html>"), (200, {"models": []})):
        server.models = answer
        assert client.find_models() is None
    server.models = (401, {"error": "no key"})
    with pytest.raises(ServerError, match="no key; it does not accept the key"):
        client.find_models()


def test_reply_of_something_else_ends_the_run(server):
    for body in (b"<html>", [1]):
        server.answer = lambda _, body=body: (200, body)
        with pytest.raises(ServerError, match="none of a chat server"):
            make_client(server).complete(BODY)


def test_nobody_there_and_no_url():
    with pytest.raises(ServerError, match="no connection"):
        ChatClient("http://127.0.0.1:9/v1", num_retries=1, first_pause=0.001).complete(BODY)
    with pytest.raises(ValueError, match="give http://host:port/v1"):
        ChatClient("127.0.0.1:8000")


def test_closing_ends_requests_and_pauses_at_once(server):
    release = threading.Event()
    server.answer = lambda _: release.wait(20) and GOOD
    client, errors = make_client(server, timeout=20), []

    def ask() -> None:
        with pytest.raises(ServerError) as raised:
            client.complete(BODY)
        errors.append(raised.value)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while len(server.requests) < 3:
        time.sleep(0.01)
    client.close()
    for thread in threads:
        thread.join()
    release.set()
    assert len(errors) == 3
    assert time.monotonic() - begin < 5
