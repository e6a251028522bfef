"""Starting vLLM inside a training process, without weights, and leaving the process as it was.

vLLM seeds the global random generators, replaces `torch.set_num_threads` on CPUs and sets environment variables. All
of that is restored, for the training in the same process.
"""

import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from verl.config import RolloutConfig
from verl.model.precision import resolve_precision

NO_WEIGHTS = "no_weights"
"""Name of our vLLM load format."""
CPU_BLOCK_SIZE = 32
"""Tokens that share a cache block; vLLM's 128 on CPUs leaves little of a short prompt to share."""
CPU_KV_CACHE_GIB = 1
OVERWRITTEN_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD", "TORCHINDUCTOR_COMPILE_THREADS")


def prepare_environment(config: RolloutConfig, device: torch.device) -> None:
    """Set what vLLM reads from the environment; call before the first import of vllm in the process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # it knows neither processed log-probs nor our mask
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if importlib.util.find_spec("flashinfer") is None:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if device.type == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib or CPU_KV_CACHE_GIB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks of one machine would share a core
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # half a minute of compilation for nothing


def start_llm(
    folder: Path,
    config: RolloutConfig,
    max_model_len: int,
    forbidden_token_ids: Sequence[int],
    device: torch.device,
    **overrides: object,
):
    """A `vllm.LLM` whose weights are all zero; arguments as of `verl.rollout.engine.build_engine`.

    `overrides`: arguments of `vllm.LLM` that replace the ones here.
    """
    import vllm

    _register_loader()
    is_distributed = torch.distributed.is_initialized()
    assert is_distributed or config.tensor_parallel_size == 1, "tensor parallelism needs several ranks"
    on_device: dict[str, object] = {"enable_sleep_mode": True}
    num_batched_tokens = config.max_num_batched_tokens
    if device.type == "cpu":
        # A prompt cut in two would make vLLM rewind its request's random generator, which CPU generators cannot.
        on_device = {"block_size": CPU_BLOCK_SIZE, "enable_chunked_prefill": False}
        num_batched_tokens = max(num_batched_tokens, max_model_len)
    elif config.kv_cache_gib is not None:
        on_device["kv_cache_memory_bytes"] = config.kv_cache_gib * 2**30
    if config.quantization == "fp8":  # from the weights that each hand-over brings
        on_device["quantization"] = "fp8_per_channel"
        on_device["quantization_config"] = {"ignore": ["re:.*visual.*"]}
    arguments: dict[str, object] = {
        "model": str(folder),
        "load_format": NO_WEIGHTS,
        "dtype": resolve_precision(config.precision, device),
        "kv_cache_dtype": config.kv_cache_dtype,
        "seed": config.seed,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "external_launcher" if is_distributed else None,
        "disable_custom_all_reduce": True,  # each process may see its own GPU only
        "enforce_eager": config.enforce_eager or device.type == "cpu",
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "logits_processors": [forbidding(forbidden_token_ids)],
        "generation_config": "vllm",  # not the folder's: sampling is what `Sampling` says
        "limit_mm_per_prompt": {"image": 0, "video": 1},
        "mm_processor_kwargs": {"do_resize": False},  # frames come sampled and resized
        "mm_processor_cache_gb": 0,  # each video is asked for once
        "disable_log_stats": True,
        **on_device,
    }
    return vllm.LLM(**(arguments | overrides))


def _register_loader() -> None:
    """Teach vLLM to start without weights. Its own "dummy" format also overwrites buffers that no checkpoint brings
    back, such as the constants that 0.32 normalises frames with."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class ZeroWeights(BaseModelLoader):
        def download_model(self, model_config) -> None:
            """Nothing to fetch."""

        def load_weights(self, model: torch.nn.Module, model_config) -> None:
            for parameter in model.parameters():
                parameter.data.zero_()

    register_model_loader(NO_WEIGHTS)(ZeroWeights)


def forbidding(token_ids: Sequence[int]) -> type:
    """A vLLM logits processor, the same for all requests, that leaves `token_ids` no probability."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class ForbidTokens(LogitsProcessor):
        def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
            self.token_ids = torch.tensor(list(token_ids), dtype=torch.long, device=device)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update) -> None:
            """Nothing to keep for single requests."""

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill_(1, self.token_ids, -torch.inf)

    return ForbidTokens


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random generators of the process as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def process_state_kept(device: torch.device) -> Iterator[None]:
    """Give vLLM its launcher's variables while it starts, and restore the process afterwards."""
    variables = {name: os.environ.get(name) for name in OVERWRITTEN_VARIABLES}
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    if device.type == "cuda":
        importlib.import_module("torch._inductor.config")  # before vLLM tells it to compile in one thread only
    if torch.distributed.is_initialized():
        os.environ["RANK"] = str(torch.distributed.get_rank())
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        with random_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about vLLM's imports
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
