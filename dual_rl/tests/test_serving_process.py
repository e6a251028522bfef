"""`python serve.py` as a process: its command line, its signals, and what it leaves behind."""

import importlib.util
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import serve
from scoring.reward_model import RewardModel
from serving.options import read_token
from serving.server import choose_port
from serving_support import CLIPS, PROMPTS, Client, ServingProcess, assert_scored, read_all, upload_request, wait_for
from training_support import DUAL_RL

pytest_plugins = ["serving_fixtures"]
FLAGS = ["--backend", "hf", "--batch_size", "2", "--num_threads", "1"]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def test_a_taken_port_is_refused(serving):
    with pytest.raises(ValueError, match=r"cannot listen on 127.0.0.1 port \d+: Address already in use"):
        choose_port("127.0.0.1", serving().client.port)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_ckpt", "/nowhere"], "/nowhere"),
        (["--roots", "nowhere"], "no such folder: nowhere"),
        (["--token_file", "nowhere"], "nowhere"),
        (["--host", "999.1.1.1"], "cannot listen on 999.1.1.1"),
        (["--max_videos", "9", "--max_queue", "8"], "max_videos=9 is over max_queue=8"),
        (["--body_timeout", "0"], "body_timeout is 0.0"),
        (["--max_new_tokens", "9000000"], "lower max_new_tokens"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(small_model, capfd, monkeypatch, flags, message):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert serve.main(["--model_ckpt", str(small_model), "--port", "0", *flags]) == 1
    assert message in capfd.readouterr().err.splitlines()[-1]


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
        wait_for(lambda: client.num_under_way() > 15, "requests in flight")
        receiving = client.open(upload_request([b"a"], token="secret", num_bytes=50))
        server.process.terminate()
        wait_for(lambda: client.health() == 503, "stopping")
        assert b"503 Service Unavailable" in read_all(receiving)
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
        "from scoring.reward_model import RewardModel\n"
        "def fail(self): raise RuntimeError('device lost')\n"
        "RewardModel.advance = fail\n"
        "sys.exit(serve.main(sys.argv[1:]))\n"
    )
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, *FLAGS], script=script)
    reply = server.client().upload([CLIPS[0].read_bytes()], ["a"])
    assert (reply.status, "device lost" in reply.json["error"]) == (500, True)
    assert server.wait() == 1
    assert "RuntimeError: device lost" in server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.slow
def test_a_server_out_of_grace_ends_in_the_middle_of_a_step_and_of_a_body(small_model, tmp_path):
    arguments = ["--model_ckpt", small_model, *FLAGS, "--grace_seconds", "0.2", "--max_new_tokens", "3000"]
    server = ServingProcess(tmp_path / "server", arguments)
    client = server.client()
    with ThreadPoolExecutor(4) as pool, client.open(upload_request([b"a"], num_bytes=50)):
        waiting = [pool.submit(client.upload, [clip.read_bytes()], ["a"]) for clip in CLIPS[:4]]
        wait_for(lambda: client.metric("descore_in_flight") > 0, "in flight")
        server.process.send_signal(signal.SIGINT)
        assert [future.result().status for future in waiting] == [503] * 4
        assert server.wait(60) == 0, server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.slow
def test_a_server_that_still_loads_ends_at_once_and_a_killed_one_leaves_nothing_for_long(small_model, tmp_path):
    killed = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, *FLAGS])
    with killed.client().open(upload_request([bytes(5 << 20)], num_bytes=4 << 20)):
        killed.process.kill()
    killed.wait()
    (left,) = killed.temporary.iterdir()
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, *FLAGS])
    client = server.client(wanted="listening")
    assert not left.exists()
    wait_for(lambda: client.health() == 503, "an answer")
    assert client.upload([b"a"], ["b"]).status == 503
    server.process.terminate()
    start = time.monotonic()
    assert server.wait() == 0, server.console.read_text()
    assert time.monotonic() - start < 15
    assert not list(server.temporary.iterdir())


@needs_vllm
@pytest.mark.slow
def test_vllm_serves_from_its_thread(small_model, offline, tmp_path):
    flags = ["--backend", "vllm", "--batch_size", 4, "--max_new_tokens", 8, "--max_prompt_length", 1024]
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", small_model, "--roots", CLIPS[0].parent, *flags])
    client = server.client(seconds=300)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: client.score_paths(CLIPS, PROMPTS), range(16)))
    for reply in replies:
        assert_scored(reply.results, offline)
    server.process.terminate()
    assert server.wait(60) == 0, server.console.read_text()
    assert not list(server.temporary.iterdir())


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_proxy_of_the_readme_passes_uploads_on_and_closes_silent_connections(serving, offline, tmp_path):
    (config,) = re.findall(r"```nginx\n(.*?)```", (DUAL_RL / "README.md").read_text(), re.DOTALL)
    server, port = serving(), choose_port("127.0.0.1", 0)
    certificate = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=rewards", "-out", "rewards.pem"]
    subprocess.run(["openssl", *certificate, "-keyout", "rewards.key"], cwd=tmp_path, check=True, capture_output=True)
    config = config.replace("/etc/ssl/", f"{tmp_path}/").replace("127.0.0.1:8000", f"127.0.0.1:{server.client.port}")
    path = write_nginx(tmp_path / "as_documented.conf", config)
    subprocess.run(["nginx", "-t", "-p", tmp_path, "-c", path], check=True, capture_output=True)
    plain = config.replace("listen 443 ssl", f"listen 127.0.0.1:{port}").replace(
        "header_timeout 10s", "header_timeout 1s"
    )
    path = write_nginx(tmp_path / "plain.conf", re.sub(r"ssl_.*;", "", plain))
    proxy = subprocess.Popen(["nginx", "-p", tmp_path, "-c", path, "-g", "daemon off;"])
    try:
        client = Client(port)
        wait_for(lambda: client.health() == 200, "nginx")
        assert_scored(client.upload([clip.read_bytes() for clip in CLIPS], PROMPTS).results, offline)
        assert client.request("POST", "/v1/score/upload", b"", {"Content-Length": str(257 << 20)}).status == 413
        with client.open(b"GET /health HTTP/1.1\r\nHost:") as silent:
            assert b"200" not in silent.recv(1000)
    finally:
        proxy.terminate()
        proxy.wait(10)


def write_nginx(path: Path, config: str) -> Path:
    """A whole configuration around what the README gives."""
    folders = "".join(
        f"{kind}_temp_path {path.parent}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"user root;\npid {path.parent}/nginx.pid;\nerror_log {path.parent}/error.log;\nevents {{}}\n"
    path.write_text(f"{head}http {{\naccess_log off;\n{folders}{config}}}\n")
    return path
