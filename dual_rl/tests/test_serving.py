"""The reward server scores as the offline model does, under load and trouble, and leaves nobody without an answer."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from model_support import CLIPS
from reward_client import RewardClient, RewardServerError, ServerPath
from scoring.source import RewardScale
from serving.requests import ServerLimits
from serving_support import (
    HEADER_SECONDS,
    PROMPTS,
    SECONDS,
    TOLERANCE,
    Client,
    assert_busy,
    assert_scored,
    read_all,
    results,
    upload_bytes,
    wait_for,
)

pytest_plugins = ["serving_fixtures"]


def test_paths_and_uploads_score_as_the_offline_model_does(serving, offline, scored_paths):
    client = serving().client
    assert_scored(results(client.score_paths(CLIPS)), offline)
    assert_scored(results(client.score_paths([clip.name for clip in CLIPS])), offline)
    assert scored_paths == [str(clip.resolve()) for clip in CLIPS] * 2
    reply = client.upload([clip.read_bytes() for clip in CLIPS], PROMPTS)
    assert_scored(results(reply), offline)
    assert (reply.json()["model"], reply.json()["scale"]) == ("small", None)
    for kind in (ServerPath, Path, str, Path.read_bytes):
        (score,) = RewardClient(f"http://127.0.0.1:{client.port}").score([kind(CLIPS[0])], PROMPTS[:1])
        assert (score.reward, score.cot) == (pytest.approx(offline[0]["reward"], abs=TOLERANCE), offline[0]["cot"])


def test_a_request_asks_for_several_thoughts(serving, reward_model):
    client, clip = serving(limits=ServerLimits(max_thoughts=4)).client, CLIPS[0]
    (offline,) = reward_model.score_videos([clip], PROMPTS[:1], num_thoughts=3)
    for video in (ServerPath(clip), clip):
        (score,) = RewardClient(f"http://127.0.0.1:{client.port}", num_thoughts=3).score([video], PROMPTS[:1])
        assert (score.reward, score.standard_error) == pytest.approx(
            (offline.reward, offline.standard_error), abs=1e-5
        )
        assert [thought["cot"] for thought in score.thoughts] == [thought.cot for thought in offline.thoughts]
    with pytest.raises(RewardServerError, match="num_thoughts is '5'; give a number from 1 to 4"):
        RewardClient(f"http://127.0.0.1:{client.port}", num_thoughts=5).score([ServerPath(clip)], PROMPTS[:1])


def test_rewards_are_on_the_scale_that_the_answer_names(serving, offline):
    scale = RewardScale(mean=0.5, std=2.0, num_videos=10, data="val.csv", weights="w", video={"fps": 2.0})
    reply = serving(scale=scale).client.score_paths(CLIPS)
    assert reply.json()["scale"] == asdict(scale)
    assert_scored(results(reply), [{**result, "reward": (result["reward"] - 0.5) / 2.0} for result in offline])


def test_64_clients_in_parallel_get_their_own_answers(serving, offline):
    """Beside clients that send slowly, leave, have no token, or ask for a file outside of the roots."""
    server = serving(token="secret", limits=ServerLimits(body_timeout=1.0))
    content = [CLIPS[0].read_bytes()]
    slow = [server.client.open(upload_bytes(content, token="secret", num_bytes=50)) for _ in range(8)]
    leaving = [server.client.open(upload_bytes(content, token="secret")) for _ in range(8)]

    def ask(number: int) -> httpx.Response:
        clip, prompt = CLIPS[number % len(CLIPS)], PROMPTS[number % len(CLIPS)]
        if number % 8 == 7:
            return Client(server.client.port, "guess").score_paths([clip], [prompt])
        if number % 2:
            return server.client.upload([clip.read_bytes()], [prompt])
        return server.client.score_paths([clip, "/etc/passwd"], [prompt, "a"])

    with ThreadPoolExecutor(64) as pool:
        replies = pool.map(ask, range(64))
        for connection in leaving:
            connection.close()
        for number, reply in enumerate(replies):
            if number % 8 == 7:
                assert reply.status_code == 401
            else:
                assert_scored(results(reply)[:1], [offline[number % len(CLIPS)]])
    assert all(b"408 Request Timeout" in read_all(connection) for connection in slow)
    assert server.client.metric('descore_refused_total{status="408"}') == 8
    assert server.client.health() == 200


def test_connections_without_a_whole_header_are_closed_and_lock_nobody_out(serving, offline):
    server = serving()
    silent = [server.client.open(b"") for _ in range(200)]
    dribbling = server.client.open(b"GET /health HTTP/1.1\r\nX: ")
    start = time.monotonic()
    assert_scored(results(server.client.score_paths(CLIPS[:1], PROMPTS[:1])), offline[:1])
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - start < 10:
            dribbling.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - start < HEADER_SECONDS + 4
    for connection in silent:
        read_all(connection)
    assert time.monotonic() - start < HEADER_SECONDS + 10


def test_only_so_many_bodies_are_received_at_a_time(serving):
    server = serving(limits=ServerLimits(max_receiving=2, body_timeout=20))
    held = [server.client.open(upload_bytes([b"a"], num_bytes=50)) for _ in range(2)]
    wait_for(lambda: server.client.upload([b"a"]).status_code == 503, "no room")
    assert "retry-after" in server.client.upload([b"a"]).headers
    for connection in held:
        connection.close()
    wait_for(lambda: server.client.upload([b"a"]).status_code == 200, "room again")


def test_videos_of_a_client_that_leaves_are_dropped_unless_they_were_started(serving, gate, offline):
    """Those that were started are finished, and their files stay until then."""
    server = serving()
    connection = server.client.open(upload_bytes([CLIPS[0].read_bytes()]))
    server.wait_for_pending(1)
    leaving = server.client.open(upload_bytes([clip.read_bytes() for clip in CLIPS * 2]))
    server.wait_for_pending(1 + 2 * len(CLIPS))
    leaving.close()
    server.wait_for_pending(1)
    assert server.client.metric('descore_videos_total{outcome="dropped"}') == 2 * len(CLIPS)
    connection.close()
    time.sleep(0.1)
    assert list(server.folder.rglob("video_0"))
    gate.is_open.set()
    wait_for(lambda: not list(server.folder.iterdir()), "uploads gone")
    assert_scored(results(server.client.score_paths(CLIPS[:1], PROMPTS[:1])), offline[:1])


def test_a_full_queue_refuses_at_once_and_recovers(serving, gate, offline):
    server = serving(limits=ServerLimits(max_queue=4, max_videos=4))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.client.score_paths, CLIPS[:1], PROMPTS[:1])
        server.wait_for_pending(1)
        second = pool.submit(server.client.score_paths, CLIPS[:4], PROMPTS[:4])
        server.wait_for_pending(5)
        assert_busy(server.client.score_paths(CLIPS[:1], PROMPTS[:1]), 2)
        impatient = RewardClient(f"http://127.0.0.1:{server.client.port}", num_retries=0, timeout=5)
        with pytest.raises(RewardServerError, match="queue is full: 4 of 4"):
            impatient.score([bytes(20 << 20)], ["a long upload"])
        gate.is_open.set()
        assert_scored(results(first.result()), offline[:1])
        assert_scored(results(second.result()), offline[:4])
    assert_scored(results(server.client.score_paths(CLIPS[:4], PROMPTS[:4])), offline[:4])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_everyone_waiting_hears_that_the_engine_failed(serving, gate):
    server = serving()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:3], PROMPTS[:3]) for _ in range(4)]
        waiting += [pool.submit(server.client.upload, [CLIPS[0].read_bytes()]) for _ in range(4)]
        server.wait_for_pending(16)
        gate.failure = RuntimeError("out of memory")
        gate.is_open.set()
        replies = [future.result() for future in waiting]
    replies.append(server.client.score_paths(CLIPS[:1], PROMPTS[:1]))
    assert [reply.status_code for reply in replies] == [500] * 9
    assert all("RuntimeError: out of memory" in reply.json()["error"] for reply in replies)
    assert server.client.health() == 503
    assert server.scoring.ended.done()


@pytest.mark.parametrize("is_in_time", [True, False], ids=["finished", "out of grace"])
def test_a_stopping_server_takes_no_more_and_finishes_what_it_has_or_refuses_it(serving, gate, offline, is_in_time):
    server = serving()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.client.score_paths, CLIPS[:4], PROMPTS[:4]) for _ in range(3)]
        server.wait_for_pending(12)
        server.scoring.stop()
        server.scoring.stop()  # a second signal changes nothing
        assert_busy(server.client.score_paths(CLIPS[:1], PROMPTS[:1]), 10)
        assert server.client.health() == 503
        if is_in_time:
            gate.is_open.set()
        else:
            server.scoring.abandon()
        replies = [future.result() for future in waiting]
    for reply in replies:
        if is_in_time:
            assert_scored(results(reply), offline[:4])
        else:
            assert_busy(reply, 10)
    assert server.scoring.ended.result(SECONDS) is None


def test_videos_that_fail_do_so_alone_and_metrics_count_them(serving, offline, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(CLIPS[0].read_bytes()[:400])
    client = serving(roots=[tmp_path, CLIPS[0].parent]).client
    reply = client.score_paths([*CLIPS[:2], "broken.mp4"], [PROMPTS[0], "b <Reward>", "c"])
    scored = results(reply)
    assert_scored(scored[:1], offline[:1])
    assert "reserved token" in scored[1]["error"]
    assert "does not decode" in scored[2]["error"]
    assert str(tmp_path) not in reply.text
    client.post("/v1/score", json={})
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")
    counts = {
        'videos_total{outcome="scored"}': 1,
        'videos_total{outcome="failed"}': 2,
        'refused_total{status="422"}': 1,
        'request_seconds_count{route="paths"}': 2,
    }
    assert {name: client.metric(f"descore_{name}") for name in counts} == counts
    assert client.num_pending() == 0
