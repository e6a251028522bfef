"""Several engines behind one port, as `serve.py --num_replicas` starts them."""

import os
import signal
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import serve
from model_support import CLIPS, write_small_model
from reward_client import RewardClient, ServerPath
from serving_support import PROMPTS, TOLERANCE, ServingProcess, results, wait_for

pytest_plugins = ["serving_fixtures"]
FLAGS = ["--backend", "hf", "--batch_size", "4", "--num_threads", "1", "--max_new_tokens", "8", "--num_replicas", "2"]
SCORED = 'descore_videos_total{outcome="scored"}'
NUM_CLIENTS, CLIPS_EACH = 64, 3


def find_replicas(port: int) -> set[int]:
    """Processes that Serve runs for the server on this port; Ray writes the name into their command lines."""
    mark = f"ServeReplica:descore-{socket.gethostname()}-127.0.0.1-{port}:".encode()
    return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if mark in path.read_bytes()}


@pytest.fixture(autouse=True)
def ray_folder(monkeypatch):
    """Pytest's folders are too deep for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray_") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.mark.slow
def test_a_replica_killed_under_load_leaves_no_request_unanswered_and_comes_back(
    small_model, tmp_path, offline, request
):
    """64 clients that do not retry get the offline rewards; then Ctrl-C at the terminal lets running requests end."""
    arguments = ["--model_ckpt", small_model, "--roots", CLIPS[0].parent, *FLAGS]
    server = ServingProcess(tmp_path / "server", arguments, start_new_session=True)
    request.addfinalizer(server.process.kill)  # and Ray with it
    client = server.client()
    killed, other = find_replicas(client.port)

    def ask(number: int) -> list[tuple[int, float, str]]:
        chosen = [(number + offset) % len(CLIPS) for offset in range(CLIPS_EACH)]
        videos = [ServerPath(CLIPS[index]) if number % 2 else CLIPS[index].read_bytes() for index in chosen]
        scores = RewardClient(f"http://127.0.0.1:{client.port}", num_retries=0).score(
            videos, [PROMPTS[index] for index in chosen]
        )
        assert all(score.error is None for score in scores), scores
        return [(index, score.reward, score.cot) for index, score in zip(chosen, scores, strict=True)]

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [pool.submit(ask, number) for number in range(NUM_CLIENTS)]
        wait_for(lambda: client.metric("descore_queue_length") > 0, "both replicas full", 60)
        wait_for(lambda: SCORED in client.get("/metrics").text, "first rewards", 60)
        os.kill(killed, signal.SIGKILL)
        for index, reward, cot in (scored for answer in answers for scored in answer.result()):
            assert (reward, cot) == (pytest.approx(offline[index]["reward"], abs=TOLERANCE), offline[index]["cot"])
    assert "a replica died" in server.console.read_text()
    assert client.metric(SCORED) == NUM_CLIENTS * CLIPS_EACH
    wait_for(lambda: client.get("/health").json()["engines"] == 2, "a new replica", 120)
    assert client.metric("descore_engines") == 2
    assert find_replicas(client.port) > {other}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.score_paths, CLIPS * 4, PROMPTS * 4)
        wait_for(lambda: client.num_pending() > 0, "in flight")
        os.killpg(server.process.pid, signal.SIGINT)
        assert [result["cot"] for result in results(running.result())] == [expected["cot"] for expected in offline * 4]
    server.assert_ends(0, seconds=60)
    assert not find_replicas(client.port)


@pytest.mark.slow
def test_a_model_that_no_replica_can_load_ends_the_server_with_the_reason(tmp_path):
    model = write_small_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.visual.merger.norm.weight"] = torch.zeros(3)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    server = ServingProcess(tmp_path / "server", ["--model_ckpt", model, *FLAGS])
    server.assert_ends(1, seconds=120)
    assert "\nRuntimeError: a replica cannot start: RuntimeError: " in server.console.read_text()


def test_a_number_of_replicas_is_checked_before_ray_starts(capsys):
    for count in ("0", "many", "1.5"):
        with pytest.raises(SystemExit):
            serve.parse_arguments(["--model_ckpt", "m", "--num_replicas", count])
        assert "--num_replicas" in capsys.readouterr().err
    assert serve.parse_arguments(["--model_ckpt", "m", "--num_replicas", "auto"]).num_replicas is None
