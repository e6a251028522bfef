"""Collecting CoTs with vLLM and the tiny base model, which judges clips of the toy world: here, and from a server.

A run that is killed and started again ends with the files of an uninterrupted one, byte for byte.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoProcessor

from checkpoint import stored_video_budget
from cot_support import read_rows
from infer_utils.chat_client import ChatClient
from infer_utils.cot_endpoint import EndpointSource, encode_frames
from infer_utils.cot_plan import Sampling
from model_qwen3 import add_reward_token
from preference_csv import CsvNeeds, read_pairs
from scored_sequence import SequenceBuilder
from stage1_support import STAGE_DIR, TINY_BASE
from vision_process import load_video

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
NUM_PAIRS = 24
SECONDS = 300.0
SAMPLING = {"max_tokens": 320, "temperature": 1.0, "top_p": 1.0, "num_samples": 4}
CPU_ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def pairs_csv(tmp_path_factory) -> Path:
    """The toy world's training pairs, without CoTs and scores."""
    world = tmp_path_factory.mktemp("world")
    command = [sys.executable, "datasets/make_toy_world.py", "--output", str(world)]
    counts = ["--train_pairs", str(NUM_PAIRS), "--eval_pairs", "4"]
    subprocess.run([*command, *counts], cwd=STAGE_DIR, check=True, capture_output=True)
    lines = [{k: row[k] for k in ("videos", "problem", "prompt", "GSB")} for row in read_rows(world / "train.csv")]
    path = world / "pairs.csv"
    path.write_text("videos,problem,prompt,GSB\n" + "".join(_csv_line(line) for line in lines))
    return path


def _csv_line(cells: dict[str, str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells.values()) + "\n"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--model", str(TINY_BASE), "--served-model-name", "tiny"]
    options += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--generation-config", "vllm"]
    options += ["--max-num-batched-tokens", "8192", "--block-size", "32", "--no-enable-chunked-prefill"]
    options += ["--limit-mm-per-prompt", '{"image": 0, "video": 1}', "--trust-request-mm-kwargs"]
    with log.open("wb") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **CPU_ENGINE},
        )
    deadline = time.monotonic() + SECONDS
    while not _is_ready(port):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) is not None


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Run:
    """`python -m infer_utils.collect_cot` as a process of its own."""

    def __init__(self, path: Path, output: Path, **options: object) -> None:
        self.output = output
        self.journal = output.with_suffix(".samples.jsonl")
        parts = [part for name, value in {**SAMPLING, **options}.items() for part in (f"--{name}", str(value))]
        self.console = output.with_suffix(f".{time.monotonic_ns()}.log")
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "infer_utils.collect_cot", str(path), "--output", str(output), *parts],
                cwd=STAGE_DIR,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **CPU_ENGINE},
            )

    def kill_at(self, num_lines: int) -> int:
        """SIGKILL once the journal has so many lines; returns how many it then has."""
        deadline = time.monotonic() + SECONDS
        while not self.journal.exists() or self.journal.read_bytes().count(b"\n") < num_lines:
            assert self.process.poll() is None, self.console.read_text()
            assert time.monotonic() < deadline, self.console.read_text()
            time.sleep(0.01)
        self.process.kill()
        assert self.process.wait(SECONDS) == -signal.SIGKILL
        assert not self.output.exists()
        return self.journal.read_bytes().count(b"\n")

    def wait(self) -> "Run":
        """Until it has ended well."""
        assert self.process.wait(SECONDS) == 0, self.console.read_text()
        return self

    @property
    def files(self) -> list[bytes]:
        return [self.output.read_bytes(), self.output.with_suffix(".report.json").read_bytes()]

    @property
    def samples(self) -> list[str]:
        """The journal's lines, in no order."""
        return sorted(self.journal.read_text().splitlines()[1:])

    @property
    def report(self) -> dict:
        return json.loads(self.files[1])


@pytest.fixture(scope="module")
def offline(pairs_csv) -> Run:
    """All pairs by vLLM in the run's own process, uninterrupted."""
    return Run(pairs_csv, pairs_csv.with_name("offline.csv"), model=TINY_BASE).wait()


def assert_killed_run_ends_alike(whole: Run, path: Path, name: str, **options: object) -> None:
    num_all = len(whole.samples)
    for share in (0.1, 0.5):  # killed twice
        num_lines = Run(path, path.with_name(name), **options).kill_at(int(share * num_all) + 1)
        assert num_lines < num_all
    last = Run(path, path.with_name(name), **options).wait()
    assert last.samples == whole.samples
    assert last.files == whole.files


def test_tiny_base_collects_cots_that_training_takes(offline):
    report, rows = offline.report, read_rows(offline.output)
    assert (report["rows"], report["videos"], report["failures"]) == (NUM_PAIRS, 2 * NUM_PAIRS, [])
    assert report["samples"] == 4 * 2 * NUM_PAIRS
    assert report["rows_with_collected_cots"] == NUM_PAIRS
    assert report["rows_agreeing"] > 0.8 * NUM_PAIRS
    assert report["samples_with_another_prompt"] == 0
    assert len(read_pairs(offline.output, CsvNeeds())) == NUM_PAIRS
    assert all(row["CoT_A"].startswith("Subject") and row["CoT_A"].endswith("</answer>") for row in rows)


def test_killed_offline_run_ends_like_an_uninterrupted_one(offline, pairs_csv):
    # Another number of samples at a time changes the batches, and nothing else.
    assert_killed_run_ends_alike(offline, pairs_csv, "killed.csv", model=TINY_BASE, max_num_seqs=24)


def test_killed_run_on_a_server_ends_like_an_uninterrupted_one(server_url, pairs_csv):
    options = {"model": "tiny", "endpoint": server_url, "processor": TINY_BASE, "concurrency": 8}
    whole = Run(pairs_csv, pairs_csv.with_name("served.csv"), **options).wait()
    assert whole.report["rows_with_collected_cots"] == NUM_PAIRS
    assert whole.report["samples_with_another_prompt"] == 0
    assert_killed_run_ends_alike(whole, pairs_csv, "served_killed.csv", **{**options, "concurrency": 3})


def test_frames_on_a_server_give_the_cots_of_vllm_in_this_process(server_url, pairs_csv, offline):
    served = Run(
        pairs_csv,
        pairs_csv.with_name("frames.csv"),
        model="tiny",
        endpoint=server_url,
        processor=TINY_BASE,
        send_video="frames",
    ).wait()
    assert served.files == offline.files


def test_server_reads_the_token_ids_that_training_has(server_url, clips):
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    add_reward_token(processor)
    builder, budget = SequenceBuilder(processor), stored_video_budget(str(TINY_BASE))
    client, sampling = ChatClient(server_url), Sampling(1, 0.0, 1.0, 1, 0)
    source = EndpointSource(
        client, "tiny", builder=builder, budget=budget, sampling=sampling, form="frames", concurrency=1
    )
    assert source.check() == 1024
    for clip in clips:
        video = load_video(clip, budget)
        url, fields = encode_frames(video)
        content = [
            {"type": "video_url", "video_url": {"url": url}} if block["type"] == "video" else block
            for block in builder.user_blocks("Before <video> after it.")
        ]
        request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}
        reply = client.complete(json.dumps({**request, "return_token_ids": True}).encode())
        expected = builder.encode_prompt("Before <video> after it.", video).input_ids.tolist()
        assert reply["prompt_token_ids"] == expected
