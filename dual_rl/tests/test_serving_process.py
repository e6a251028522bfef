"""`python serve.py` as a process: its command line, its signals, and what it leaves behind."""

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import serve
from serving_support import CLIPS, PROMPTS, ServingProcess, assert_scored, wait_for
from verl.inference.reward_model import RewardModel
from verl.serving.options import parse_arguments, read_token
from verl.serving.server import describe_address, open_socket

pytest_plugins = ["serving_fixtures"]
FLAGS = ["--backend", "hf", "--batch_size", "2", "--num_threads", "1"]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def test_addresses_and_warnings_are_told(monkeypatch):
    with open_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        (line,) = describe_address(listener, has_token=False)
        assert line == f"listening at http://127.0.0.1:{port}, for this machine only; others need --host 0.0.0.0"
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            open_socket("127.0.0.1", port)
    with open_socket("0.0.0.0", 0) as listener:
        told = describe_address(listener, has_token=False)
        assert f":{listener.getsockname()[1]}" in told[0]
        assert "0.0.0.0:" not in told[0]
        assert "WARNING" in told[1]
        assert len(describe_address(listener, has_token=True)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_ckpt", "/nowhere"], "/nowhere"),
        (["--roots", "nowhere"], "no such folder: nowhere"),
        (["--token_file", "nowhere"], "nowhere"),
        (["--host", "999.1.1.1"], "cannot listen on 999.1.1.1"),
        (["--max_videos", "9", "--max_queue", "8"], "would never fit max_queue=8"),
        (["--body_timeout", "0"], "body_timeout is 0.0"),
        (["--max_gigapixels", "-1"], "max_gigapixels is -1.0"),
        (["--max_new_tokens", "9000000"], "lower max_new_tokens"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(small_model, capfd, monkeypatch, flags, message):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert serve.main(["--model_ckpt", str(small_model), "--port", "0", *flags]) == 1
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_the_limit_on_decoding_reaches_the_model(small_model, tmp_path):
    arguments = ["--model_ckpt", str(small_model), *FLAGS, "--max_gigapixels", "1e-6", "--max_new_tokens", "4"]
    service = serve.build_service(parse_arguments(arguments, description=""), tmp_path)
    service.scoring.start()
    wait_for(lambda: service.scoring.state == "ready", "ready")
    (future,) = service.scoring.submit([(str(CLIPS[0]), "a")])
    assert "too large to decode" in future.result().error
    service.scoring.stop()
    assert service.scoring.join(10)


@pytest.mark.parametrize("content", ["", " \n", "two words", "t\xe9"])
def test_a_file_without_a_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="token_file"):
        read_token(str(tmp_path / "token"))


def test_sigterm_with_requests_in_flight(small_model, tmp_path):
    """Everyone is answered: with rewards who was accepted, with 503 who came later; then the process ends well."""
    (tmp_path / "token").write_text("secret\n")
    arguments = ["--model_ckpt", small_model, "--token_file", tmp_path / "token", *FLAGS, "--max_new_tokens", "32"]
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client("secret")
    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(client.upload, [clip.read_bytes()] * 3, ["a"] * 3) for clip in CLIPS]
        under_way = ("descore_queue_length", "descore_in_flight")
        wait_for(lambda: sum(map(client.metric, under_way)) > 15, "requests in flight")
        server.stop()
        wait_for(lambda: client.get("/health").status == 503, "stopping")
        late = client.upload([b"a"], ["b"])
        replies = [future.result() for future in waiting]
    assert (late.status, late.headers.get("retry-after")) == (503, "10")
    scored = [reply for reply in replies if reply.status == 200]
    assert len(scored) >= 5
    assert all("reward" in result for reply in scored for result in reply.results)
    assert all("retry-after" in reply.headers for reply in replies if reply.status != 200)
    assert server.wait() == 0, server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.slow
def test_a_failing_engine_ends_the_process_with_an_error(small_model, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys, serve\n"
        "from verl.inference.reward_model import RewardModel\n"
        "def fail(self): raise RuntimeError('device lost')\n"
        "RewardModel.advance = fail\n"
        "sys.exit(serve.main(sys.argv[1:]))\n"
    )
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, *FLAGS], script=script)
    client = server.client()
    reply = client.upload([CLIPS[0].read_bytes()], ["a"])
    assert (reply.status, "device lost" in reply.json["error"]) == (500, True)
    assert server.wait() == 1
    assert "RuntimeError: device lost" in server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.slow
def test_a_server_out_of_grace_ends_in_the_middle_of_a_step(small_model, tmp_path):
    arguments = ["--model_ckpt", small_model, *FLAGS, "--grace_seconds", "0.2", "--max_new_tokens", "3000"]
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(client.upload, [clip.read_bytes()], ["a"]) for clip in CLIPS[:4]]
        wait_for(lambda: client.metric("descore_in_flight") > 0, "in flight")
        server.stop()
        assert [future.result().status for future in waiting] == [503] * 4
    assert server.wait(60) == 0, server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.slow
def test_a_server_that_still_loads_ends_at_once(small_model, tmp_path):
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, *FLAGS])
    client = server.client(wanted="listening")
    wait_for(lambda: client.is_answering(), "an answer")
    assert client.get("/health").status == 503
    assert client.upload([b"a"], ["b"]).status == 503
    server.stop()
    start = time.monotonic()
    assert server.wait() == 0, server.console.read_text()
    assert time.monotonic() - start < 15
    assert not list(server.temporary.iterdir())


@needs_vllm
@pytest.mark.slow
def test_vllm_serves_from_its_thread(small_model, model, offline, tmp_path):
    flags = ["--backend", "vllm", "--batch_size", 4, "--max_new_tokens", 8, "--max_prompt_length", 1024]
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, "--roots", CLIPS[0].parent, *flags])
    client = server.client(seconds=300)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: client.score_paths(CLIPS, PROMPTS), range(16)))
    for reply in replies:
        assert_scored(reply.results, offline)
    server.stop()
    assert server.wait(60) == 0, server.console.read_text()
    assert not list(server.temporary.iterdir())
