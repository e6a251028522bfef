"""The reward server: answers as the offline model, under load and trouble, and leaves nobody without an answer."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import pytest
from prometheus_client.parser import text_string_to_metric_families

import verl.serving.lingering
from serving_support import (
    CLIPS,
    FORM_HEADERS,
    PROMPTS,
    SECONDS,
    SETTINGS,
    Client,
    Reply,
    assert_scored,
    form_body,
    read_all,
    start_of_upload,
    wait_for,
    whole_upload,
)
from verl.inference.reward_model import WINDOW
from verl.inference.scale import RewardScale
from verl.serving.limits import ServerLimits

pytest_plugins = ["serving_fixtures"]
FULL = WINDOW * SETTINGS.batch_size
"""Videos that the scoring thread takes at a time."""


def test_paths_and_uploads_score_as_the_offline_model_does(serving, offline, reads):
    client = serving().client
    assert_scored(client.score_paths(CLIPS, PROMPTS).results, offline)
    assert_scored(client.score_paths([clip.name for clip in CLIPS], PROMPTS).results, offline)
    assert reads == [str(clip.resolve()) for clip in CLIPS] * 2
    reply = client.upload([clip.read_bytes() for clip in CLIPS], PROMPTS)
    assert_scored(reply.results, offline)
    assert reply.json["model"] == "small"


def test_rewards_are_given_on_the_scale_that_is_named(serving, offline):
    scale = RewardScale(0.5, 2.0, 10, "val.csv", "w", {"fps": 2.0})
    reply = serving(scale=scale).client.score_paths(CLIPS, PROMPTS)
    assert reply.json["scale"] == asdict(scale)
    expected = [{**result, "reward": (result["reward"] - 0.5) / 2.0} for result in offline]
    assert_scored(reply.results, expected)
    assert serving().client.score_paths(CLIPS[:1], PROMPTS[:1]).json["scale"] is None


def test_64_clients_in_parallel_get_their_own_answers(serving, offline):
    """Some of them send slowly, leave, have no token, or ask for what is not to be had."""
    server = serving(token="secret", limits=ServerLimits(body_timeout=1.0))
    slow = [server.client.open(start_of_upload(token="secret")) for _ in range(8)]
    leaving = [server.client.open(whole_upload(CLIPS[0], token="secret")) for _ in range(8)]

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
                continue
            assert_scored(reply.results[:1], [offline[number % len(CLIPS)]])
    assert all(b"408 Request Timeout" in read_all(connection) for connection in slow)
    assert server.client.get("/health").status == 200


def test_a_slow_body_is_answered_in_time_and_holds_nobody_up(serving, offline):
    server = serving(limits=ServerLimits(body_timeout=0.8))
    connection = server.client.open(start_of_upload())
    trickle = threading.Thread(target=_trickle, args=(connection,))
    trickle.start()
    assert_scored(server.client.score_paths(CLIPS[:1], PROMPTS[:1]).results, offline[:1])
    start = time.monotonic()
    assert b"408 Request Timeout" in connection.recv(1 << 16)
    assert time.monotonic() - start < 5
    trickle.join()
    connection.close()
    assert server.client.metric('descore_refused_total{reason="slow_body"}') == 1


def _trickle(connection) -> None:
    """A byte now and then: a time-out between bytes would not do."""
    for _ in range(10):
        connection.sendall(b"-")
        time.sleep(0.1)


def test_only_so_many_bodies_are_received_at_a_time(serving):
    server = serving(limits=ServerLimits(max_receiving=2, body_timeout=20))
    held = [server.client.open(start_of_upload()) for _ in range(2)]
    wait_for(lambda: len(server.service.receiver._deadlines) == 2, "bodies under way")
    reply = server.client.upload([b"a"], ["b"])
    assert reply.status == 503
    assert "retry-after" in reply.headers
    for connection in held:
        connection.close()
    wait_for(lambda: server.client.upload([b"a"], ["b"]).status == 200, "room again")


def test_who_leaves_takes_the_waiting_videos_along(serving, gate, offline):
    """Those that were begun are finished, and their files stay until then."""
    server = serving()
    gate.is_open.clear()
    connection = server.client.open(whole_upload(CLIPS[0]))
    server.wait_for_waiting(1)
    body = form_body([clip.read_bytes() for clip in CLIPS * 2], PROMPTS * 2)
    head = f"POST /v1/score/upload HTTP/1.1\r\nHost: here\r\nContent-Type: {FORM_HEADERS['Content-Type']}\r\n"
    leaving = server.client.open(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
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
        for ask in (
            partial(server.client.score_paths, CLIPS[:1], PROMPTS[:1]),
            partial(server.client.upload, [b"x" * (20 << 20)], ["b"]),
        ):
            start = time.monotonic()
            reply = ask()
            assert time.monotonic() - start < 5
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) > 0
            assert "queue is full: 4 of 4" in reply.json["error"]
        gate.is_open.set()
        assert_scored(first.result().results, offline[:1])
        for future, place in zip(others, (0, 2), strict=True):
            assert_scored(future.result().results, offline[place : place + 2])
    assert_scored(server.client.score_paths(CLIPS[:4], PROMPTS[:4]).results, offline[:4])


def test_no_more_videos_are_under_way_than_the_engine_is_meant_to_hold(serving, gate):
    server = serving()
    gate.is_open.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.client.score_paths, CLIPS[:1], PROMPTS[:1])
        server.wait_for_waiting(1)
        rest = pool.submit(server.client.score_paths, CLIPS * 3, PROMPTS * 3)
        server.wait_for_waiting(1 + 3 * len(CLIPS))
        seen, submit = [], server.scoring._take
        server.scoring._take = lambda number, **options: (
            seen.append(gate.model.num_pending) or submit(number, **options)
        )
        gate.is_open.set()
        assert len(first.result().results) + len(rest.result().results) == 1 + 3 * len(CLIPS)
    assert max(seen) <= FULL


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
    assert server.client.get("/health").status == 503
    assert server.scoring.ended.done()


def test_a_stopping_server_finishes_what_it_has_and_takes_no_more(serving, gate, offline, monkeypatch):
    monkeypatch.setattr(verl.serving.lingering, "LINGER_SECONDS", 0.2)
    server = serving()
    gate.is_open.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:4], PROMPTS[:4]) for _ in range(3)]
        server.wait_for_waiting(12)
        receiving = server.client.open(start_of_upload())
        wait_for(lambda: len(server.service.receiver._deadlines) == 1, "a body under way")
        server.scoring.stop()
        server.scoring.stop()  # again: no more than once
        server.server.servers[0].get_loop().call_soon_threadsafe(server.service.receiver.interrupt)
        assert b"503 Service Unavailable" in read_all(receiving)
        reply = server.client.score_paths(CLIPS[:1], PROMPTS[:1])
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) > 0
        assert server.client.get("/health").status == 503
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
    families = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    samples = {(sample.name, *sample.labels.values()): sample.value for f in families.values() for sample in f.samples}
    assert samples["descore_videos_total", "scored"] == 1
    assert samples["descore_videos_total", "failed"] == 1
    assert samples["descore_refused_total", "invalid"] == 1
    assert samples["descore_request_seconds_count", "paths"] == 2
    assert samples["descore_queue_length",] == samples["descore_in_flight",] == 0
