"""What writes the responses: the interface of the rollout engines, the choice of one, and the seed of every response.

An engine runs in a training process, next to the sharded policy. Weights are handed over in memory. Responses carry
token ids and their log-probabilities under exactly the distribution that the trainer uses.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from verl.config import RolloutConfig
from verl.types import Response, ResponseKey, Sampling, VideoKey, VideoPrompt

SEED_BITS = 62  # leaves room to add the sample's number within a signed 64-bit integer


class RolloutEngine(Protocol):
    """Writes n responses for each video prompt.

    Tokens are drawn from softmax(logits / temperature) over the allowed tokens, cut to `top_p` and `top_k`, and
    log-probs are those of the distribution that was drawn from: with such a cut they exceed the trainer's. At
    temperature 0 the most probable token is taken and log-probs are those at temperature 1. Draws depend on the
    weights, the prompt and `response_seed` only. With tensor parallelism the ranks of a group call every method with
    the same arguments and get the same responses.
    """

    def generate(self, prompts: Sequence[VideoPrompt], sampling: Sampling) -> list[list[Response]]:
        """n responses per prompt, in order of the prompts and of `sample`; log-probs are fp32 on the CPU.

        Raises ValueError when a prompt and its response exceed `max_model_len`.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights in place and drop everything computed with the old ones.

        `weights`: pairs of Hugging Face name and whole (not partitioned) tensor, as it lies in transformers' model, on
        any device and in any precision. The iterable is always read to its end, since producing it may be
        collective. Needs `wake` before.
        """

    def sleep(self) -> None:
        """Free the memory of weights and caches. `load_weights` must follow the next `wake`."""

    def wake(self) -> None:
        """Allocate the memory again; the weights are undefined until `load_weights`."""

    def close(self) -> None:
        """End the engine. vLLM ends the process's torch.distributed with it, so this comes last on a rank."""


def build_engine(
    folder: Path,
    *,
    config: RolloutConfig,
    max_model_len: int,
    forbidden_token_ids: Sequence[int],
    eos_token_id: int,
    device: torch.device,
) -> RolloutEngine:
    """The engine that `config.name` asks for, without weights: call `load_weights` before `generate`.

    `folder`: holds config.json and the processor's files; weights in it are not read. `max_model_len`: tokens of the
    longest prompt and its response together. `forbidden_token_ids`: never drawn, and left out of the distribution.
    `device`: of this rank. With several ranks, torch.distributed is initialised and every rank calls this.
    """
    if config.name == "vllm":
        from verl.rollout.vllm_engine import VllmEngine as Engine  # vLLM need not be installed
    else:
        from verl.rollout.hf_engine import HfEngine as Engine
    return Engine(
        folder,
        config=config,
        max_model_len=max_model_len,
        forbidden_token_ids=forbidden_token_ids,
        eos_token_id=eos_token_id,
        device=device,
    )


def video_seed(sampling: Sampling, key: VideoKey) -> int:
    """Seed of a video's first response: a hash of the sampling's seed and the video's key."""
    text = f"{sampling.seed}/{key.pair_id}/{key.side}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> (64 - SEED_BITS)


def response_seed(sampling: Sampling, key: ResponseKey) -> int:
    """Seed of one response's draws, a non-negative signed 64-bit integer; independent of rank and batch."""
    return video_seed(sampling, key.video) + key.sample


def check_lengths(prompts: Sequence[VideoPrompt], sampling: Sampling, max_model_len: int) -> None:
    """Raise ValueError unless each prompt and its response fit into the engine together."""
    for prompt in prompts:
        length = prompt.input_ids.numel()
        if length + sampling.max_tokens > max_model_len:
            raise ValueError(
                f"pair {prompt.key.pair_id}, video {prompt.key.side}: a prompt of {length} tokens and a response of "
                f"{sampling.max_tokens} exceed {max_model_len}. Raise data.max_prompt_length."
            )
