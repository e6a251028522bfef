"""The reward server: answers as the offline model, under load and trouble, and leaves nobody without an answer."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from reward_client import RewardClient, RewardServerError
from scoring.source import RewardScale
from serving.limits import ServerLimits
from serving_support import (
    CLIPS,
    HEADER_SECONDS,
    PROMPTS,
    SECONDS,
    Client,
    Reply,
    assert_scored,
    read_all,
    upload_request,
    wait_for,
)

pytest_plugins = ["serving_fixtures"]


def test_paths_and_uploads_score_as_the_offline_model_does(serving, offline, scored_paths):
    client = serving().client
    assert_scored(client.score_paths(CLIPS, PROMPTS).results, offline)
    assert_scored(client.score_paths([clip.name for clip in CLIPS], PROMPTS).results, offline)
    assert scored_paths == [str(clip.resolve()) for clip in CLIPS] * 2
    reply = client.upload([clip.read_bytes() for clip in CLIPS], PROMPTS)
    assert_scored(reply.results, offline)
    assert reply.json["model"] == "small"


def test_rewards_are_given_on_the_scale_that_is_named(serving, offline):
    scale = RewardScale(0.5, 2.0, 10, "val.csv", "w", {"fps": 2.0})
    reply = serving(scale=scale).client.score_paths(CLIPS, PROMPTS)
    assert reply.json["scale"] == asdict(scale)
    assert_scored(reply.results, [{**result, "reward": (result["reward"] - 0.5) / 2.0} for result in offline])


def test_64_clients_in_parallel_get_their_own_answers(serving, offline):
    """Some of them send slowly, leave, have no token, or ask for what is not to be had."""
    server = serving(token="secret", limits=ServerLimits(body_timeout=1.0))
    content = [CLIPS[0].read_bytes()]
    slow = [server.client.open(upload_request(content, token="secret", num_bytes=50)) for _ in range(8)]
    leaving = [server.client.open(upload_request(content, token="secret")) for _ in range(8)]

    def ask(number: int) -> Reply:
        place = number % len(CLIPS)
        if number % 8 == 7:
            return Client(server.client.port, "guess").score_paths([CLIPS[place]], [PROMPTS[place]])
        if number % 2:
            return server.client.upload([CLIPS[place].read_bytes()], [PROMPTS[place]])
        return server.client.score_paths([CLIPS[place], "/etc/passwd"], [PROMPTS[place], "a"])

    with ThreadPoolExecutor(64) as pool:
        replies = pool.map(ask, range(64))
        for connection in leaving:
            connection.close()
        for number, reply in enumerate(replies):
            if number % 8 == 7:
                assert reply.status == 401
            else:
                assert_scored(reply.results[:1], [offline[number % len(CLIPS)]])
    assert all(b"408 Request Timeout" in read_all(connection) for connection in slow)
    assert server.client.metric('descore_refused_total{reason="slow_body"}') == 8
    assert server.client.health() == 200


def test_silent_connections_are_closed_and_lock_nobody_out(serving, offline):
    server = serving()
    heads = [b"", b"POST /v1/score HTTP/1.1\r\nHost:", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    silent = [server.client.open(heads[number % 3]) for number in range(1300)]
    dribbling = server.client.open(b"GET /health HTTP/1.1\r\nX: ")
    start = time.monotonic()
    assert_scored(server.client.score_paths(CLIPS[:1], PROMPTS[:1]).results, offline[:1])
    assert time.monotonic() - start < 5
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - start < 10:
            dribbling.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - start < HEADER_SECONDS + 2
    for connection in silent:
        read_all(connection)
    assert time.monotonic() - start < HEADER_SECONDS + 10


def test_only_so_many_bodies_are_received_at_a_time(serving):
    server = serving(limits=ServerLimits(max_receiving=2, body_timeout=20))
    held = [server.client.open(upload_request([b"a"], num_bytes=50)) for _ in range(2)]
    wait_for(lambda: server.client.upload([b"a"], ["b"]).status == 503, "no room")
    assert "retry-after" in server.client.upload([b"a"], ["b"]).headers
    for connection in held:
        connection.close()
    wait_for(lambda: server.client.upload([b"a"], ["b"]).status == 200, "room again")


def test_who_leaves_takes_the_waiting_videos_along(serving, gate, offline):
    """Those that were begun are finished, and their files stay until then."""
    server = serving()
    gate.is_open.clear()
    connection = server.client.open(upload_request([CLIPS[0].read_bytes()]))
    server.wait_for_waiting(1)
    leaving = server.client.open(upload_request([clip.read_bytes() for clip in CLIPS * 2]))
    server.wait_for_waiting(1 + 2 * len(CLIPS))
    leaving.close()
    server.wait_for_waiting(1)
    assert server.client.metric('descore_videos_total{outcome="dropped"}') == 2 * len(CLIPS)
    connection.close()
    time.sleep(0.1)
    assert list(server.folder.rglob("video_0"))
    gate.is_open.set()
    wait_for(lambda: not list(server.folder.iterdir()), "uploads gone")
    assert_scored(server.client.score_paths(CLIPS[:1], PROMPTS[:1]).results, offline[:1])


def test_a_full_queue_refuses_at_once_and_recovers(serving, gate, offline):
    server = serving(limits=ServerLimits(max_queue=4, max_videos=4))
    gate.is_open.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.client.score_paths, CLIPS[:1], PROMPTS[:1])
        server.wait_for_waiting(1)
        others = [pool.submit(server.client.score_paths, CLIPS[n : n + 2], PROMPTS[n : n + 2]) for n in (0, 2)]
        server.wait_for_waiting(5)
        reply = server.client.score_paths(CLIPS[:1], PROMPTS[:1])
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")
        impatient = RewardClient(f"http://127.0.0.1:{server.client.port}", num_retries=0, timeout=5)
        with pytest.raises(RewardServerError, match="queue is full: 4 of 4"):
            impatient.score([bytes(20 << 20)], ["a long upload"])
        gate.is_open.set()
        assert_scored(first.result().results, offline[:1])
        for future, place in zip(others, (0, 2), strict=True):
            assert_scored(future.result().results, offline[place : place + 2])
    assert_scored(server.client.score_paths(CLIPS[:4], PROMPTS[:4]).results, offline[:4])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_fails_everyone_waiting_is_told(serving, gate):
    server = serving()
    gate.is_open.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:3], PROMPTS[:3]) for _ in range(4)]
        waiting += [pool.submit(server.client.upload, [CLIPS[0].read_bytes()], ["a"]) for _ in range(4)]
        server.wait_for_waiting(16)
        gate.failure = RuntimeError("out of memory")
        gate.is_open.set()
        replies = [future.result() for future in waiting]
    replies.append(server.client.score_paths(CLIPS[:1], PROMPTS[:1]))
    assert [reply.status for reply in replies] == [500] * 9
    assert all("RuntimeError: out of memory" in reply.json["error"] for reply in replies)
    assert server.client.health() == 503
    assert server.scoring.ended.done()


def test_a_stopping_server_finishes_what_it_has_and_takes_no_more(serving, gate, offline):
    server = serving()
    gate.is_open.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:4], PROMPTS[:4]) for _ in range(3)]
        server.wait_for_waiting(12)
        server.scoring.stop()
        server.scoring.stop()  # again: no more than once
        reply = server.client.score_paths(CLIPS[:1], PROMPTS[:1])
        assert (reply.status, reply.headers["retry-after"]) == (503, "10")
        assert server.client.health() == 503
        gate.is_open.set()
        for future in waiting:
            assert_scored(future.result().results, offline[:4])
    assert server.scoring.ended.result(SECONDS) is None


def test_what_is_not_done_within_the_grace_is_refused(serving, gate):
    server = serving()
    gate.is_open.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:4], PROMPTS[:4]) for _ in range(3)]
        server.wait_for_waiting(12)
        server.scoring.stop()
        server.scoring.abandon()
        replies = [future.result() for future in waiting]
    assert [reply.status for reply in replies] == [503] * 3
    assert all("retry-after" in reply.headers for reply in replies)


def test_metrics_are_prometheus_text(serving):
    server = serving()
    server.client.score_paths([*CLIPS[:2], "none.mp4"], ["a", "b <Reward>", "c"])
    server.client.request("POST", "/v1/score", b"{}")
    reply = server.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.body.decode())
    samples = {(sample.name, *sample.labels.values()): sample.value for f in families for sample in f.samples}
    assert samples["descore_videos_total", "scored"] == 1
    assert samples["descore_videos_total", "failed"] == 1
    assert samples["descore_refused_total", "invalid"] == 1
    assert samples["descore_request_seconds_count", "paths"] == 2
    assert samples["descore_queue_length",] == samples["descore_in_flight",] == 0
