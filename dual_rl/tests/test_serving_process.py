"""`python serve.py` as a process: its command line, its signals, and what it leaves behind."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import serve
from model_support import CLIPS
from scoring.reward_model import RewardModel
from serving_support import ServingProcess, assert_busy, read_all, results, upload_bytes, wait_for

pytest_plugins = ["serving_fixtures"]
FLAGS = ["--backend", "hf", "--batch_size", "2", "--num_threads", "1"]
MISTAKES = {
    "/nowhere": ["--model_ckpt", "/nowhere"],
    "no such folder: nowhere": ["--roots", "nowhere"],
    "--token_file nowhere": ["--token_file", "nowhere"],
    "token_file": ["--token_file", "/dev/null"],
    "cannot listen on 999.1.1.1": ["--host", "999.1.1.1"],
    "max_videos=9 is over max_queue=8": ["--max_videos", "9", "--max_queue", "8"],
    "body_timeout is 0.0": ["--body_timeout", "0"],
    "lower max_new_tokens": ["--max_new_tokens", "9000000"],
}


def test_mistakes_are_reported_before_the_model_is_loaded(small_model, capfd, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for message, flags in MISTAKES.items():
        assert serve.main(["--model_ckpt", str(small_model), "--port", "0", *flags]) == 1
        assert message in capfd.readouterr().err.splitlines()[-1]


def test_sigterm_with_requests_in_flight(small_model, tmp_path):
    """What was accepted gets rewards, what comes later 503; then the process ends with status 0."""
    (tmp_path / "token").write_text("secret\n")
    arguments = ["--model_ckpt", small_model, "--token_file", tmp_path / "token", *FLAGS, "--max_new_tokens", "32"]
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client("secret")
    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(client.upload, [clip.read_bytes()] * 3, ["a"] * 3) for clip in CLIPS]
        wait_for(lambda: client.num_pending() > 15, "requests in flight")
        receiving = client.open(upload_bytes([b"a"], token="secret", num_bytes=50))
        server.process.terminate()
        wait_for(lambda: client.health() == 503, "stopping")
        assert b"503 Service Unavailable" in read_all(receiving)
        late = client.upload([b"a"])
        replies = [future.result() for future in waiting]
    assert_busy(late, 10)
    scored = [reply for reply in replies if reply.status_code == 200]
    assert len(scored) >= 5
    assert all("reward" in result for reply in scored for result in results(reply))
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code != 200)
    server.assert_ends(0)


@pytest.mark.slow
def test_a_server_ends_while_it_loads_and_out_of_grace_in_the_middle_of_a_step_and_of_a_body(small_model, tmp_path):
    """And the next start removes what a killed one left."""
    arguments = ["--model_ckpt", small_model, *FLAGS, "--grace_seconds", "0.2", "--max_new_tokens", "3000"]
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client()
    with ThreadPoolExecutor(4) as pool, client.open(upload_bytes([b"a"], num_bytes=50)):
        waiting = [pool.submit(client.upload, [clip.read_bytes()]) for clip in CLIPS[:4]]
        wait_for(lambda: client.metric("descore_in_flight") > 0, "in flight")
        server.process.send_signal(signal.SIGINT)
        assert [future.result().status_code for future in waiting] == [503] * 4
        server.assert_ends(0, seconds=60)
    killed = ServingProcess(tmp_path / "server", arguments)
    with killed.client().open(upload_bytes([bytes(5 << 20)], num_bytes=4 << 20)):
        killed.process.kill()
    killed.process.wait()
    (left,) = killed.temporary.iterdir()
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client(wanted="listening")
    assert not left.exists()
    wait_for(lambda: client.health() == 503, "an answer")
    assert client.upload([b"a"]).status_code == 503
    server.process.terminate()
    start = time.monotonic()
    server.assert_ends(0)
    assert time.monotonic() - start < 15
