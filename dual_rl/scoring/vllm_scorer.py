"""Thinking and scoring in one vLLM engine, with continuous batching.

Each video is two requests: the chain of thought, and then prompt, chain of thought and `<Reward>` by their ids. The
second finds all but the last few tokens in the prefix cache, its video in the processor's cache, and jumps the queue
before its cache can be taken for something else. Its reward is `<Reward>`'s raw logit, see vllm_reward.py.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scoring.scoring import ScoringSettings, ThoughtScore
from scoring.vllm_reward import ARCHITECTURE, register_reward_model, with_head
from verl.config import RolloutConfig
from verl.model.reward_files import PolicyCheckpoint
from verl.rollout.vllm_engine import with_output_layer
from verl.rollout.vllm_prompts import PromptForm, add_request, require_same_prompt
from verl.rollout.vllm_start import prepare_environment, process_state_kept, start_llm
from verl.types import VideoPrompt

CPU_KV_CACHE_GIB = 2
PROCESSOR_CACHE_GB = 4
"""For preprocessed videos between their two requests, on the host."""
SCORING, THINKING = 0, 1
"""Priorities: the lower is served first."""


@dataclass(frozen=True)
class _Thinking:
    name: str
    prompt: VideoPrompt
    video_id: str


@dataclass(frozen=True)
class _Scoring:
    thinking: _Thinking
    cot_ids: tuple[int, ...]
    is_finished: bool


class VllmScorer:
    """`ScoringEngine` with vLLM.

    `cached_tokens`, `prompt_tokens`: over all scoring requests, those found in the prefix cache and all of them.
    """

    is_continuous = True

    def __init__(
        self,
        folder: Path,
        checkpoint: PolicyCheckpoint,
        settings: ScoringSettings,
        *,
        forbidden_token_ids: Sequence[int],
        reward_token_id: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.head_weight = checkpoint.head_weight
        self.reward_token_id = reward_token_id
        self.eos_token_id = checkpoint.processor.tokenizer.eos_token_id
        self.cached_tokens = self.prompt_tokens = 0
        self._numbers = itertools.count()
        self._requests: dict[str, _Thinking | _Scoring] = {}
        config = RolloutConfig(
            precision=settings.precision,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_num_seqs=settings.batch_size,
            enforce_eager=settings.enforce_eager,
            kv_cache_gib=settings.kv_cache_gib or (CPU_KV_CACHE_GIB if device.type == "cpu" else None),
        )
        prepare_environment(config, device)
        with process_state_kept(device):
            register_reward_model()
            self.llm = start_llm(
                folder,
                config,
                max_model_len,
                forbidden_token_ids,
                device,
                hf_overrides={"architectures": [ARCHITECTURE], "reward_token_id": reward_token_id},
                logprobs_mode="raw_logits",
                scheduling_policy="priority",
                mm_processor_cache_gb=PROCESSOR_CACHE_GB,
            )
        self.form = PromptForm(folder, self.llm.get_tokenizer(), device)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the model's weights, pairs of Hugging Face name and whole tensor; the head is the checkpoint's."""
        weights = with_head(with_output_layer(weights), self.head_weight)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def submit(self, name: str, prompt: VideoPrompt) -> None:
        """See `ScoringEngine`."""
        self.form.learn(prompt, self._read_prompt)
        thinking = _Thinking(name, prompt, video_id=f"video-{next(self._numbers)}")
        if self.settings.mask_cot:
            request = self.form.request(prompt, video_id=thinking.video_id, continuation=(self.reward_token_id,))
            self._add(_Scoring(thinking, (), True), request, self._scoring_parameters(), priority=SCORING)
            return
        request = self.form.request(prompt, video_id=thinking.video_id)
        self._add(thinking, request, self.thinking_parameters(name), priority=THINKING)

    def step(self) -> list[tuple[str, ThoughtScore]]:
        """See `ScoringEngine`. Raises ValueError when vLLM reads other tokens than the trainer's."""
        ready = []
        for output in self.llm.llm_engine.step():
            if not output.finished:
                continue
            state = self._requests.pop(output.request_id)
            if isinstance(state, _Thinking):
                self._score(state, output)
            else:
                ready.append((state.thinking.name, self._read_reward(state, output)))
        return ready

    @property
    def num_unfinished(self) -> int:
        """See `ScoringEngine`."""
        return len(self._requests)

    def close(self) -> None:
        """See `ScoringEngine`."""
        self.llm.llm_engine.engine_core.shutdown()

    def _add(self, state: "_Thinking | _Scoring", request: dict, parameters, *, priority: int) -> None:
        request_id = f"request-{next(self._numbers)}"
        add_request(self.llm, request_id, request, parameters, priority=priority)
        self._requests[request_id] = state

    def _score(self, thinking: _Thinking, output) -> None:
        """Ask for the reward of a finished chain of thought."""
        require_same_prompt(thinking.prompt, output.prompt_token_ids)
        ids = tuple(output.outputs[0].token_ids)
        is_finished = bool(ids) and ids[-1] == self.eos_token_id
        state = _Scoring(thinking, ids[:-1] if is_finished else ids, is_finished)
        continuation = (*state.cot_ids, self.reward_token_id)
        request = self.form.request(thinking.prompt, video_id=thinking.video_id, continuation=continuation)
        self._add(state, request, self._scoring_parameters(), priority=SCORING)

    def _read_reward(self, state: _Scoring, output) -> ThoughtScore:
        continuation = (*state.cot_ids, self.reward_token_id)
        require_same_prompt(state.thinking.prompt, output.prompt_token_ids, continuation)
        self.cached_tokens += output.num_cached_tokens or 0
        self.prompt_tokens += len(output.prompt_token_ids)
        reward = output.outputs[0].logprobs[0][self.reward_token_id].logprob
        return ThoughtScore(state.cot_ids, state.is_finished, float(reward))

    def _read_prompt(self, request: dict) -> Sequence[int]:
        """The prompt's ids as vLLM makes them of a request; nothing else is under way."""
        add_request(self.llm, "form", request, self._scoring_parameters(), priority=THINKING)
        while True:
            for output in self.llm.llm_engine.step():
                if output.finished:
                    return output.prompt_token_ids

    def thinking_parameters(self, name: str):
        """Sampling parameters of the chain of thought of the video `name`: all alike here."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0,
            repetition_penalty=self.settings.repetition_penalty,
            max_tokens=self.settings.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=[self.eos_token_id],  # and none of generation_config.json
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _scoring_parameters(self):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=[self.reward_token_id], ignore_eos=True, detokenize=False
        )
