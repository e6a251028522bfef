"""Chain of thought and reward from one vLLM engine, with continuous batching and one copy of the weights.

Each video is two requests: the chain of thought, and then prompt, chain of thought and `<Reward>` by their ids. The
second finds all but the last few tokens in the prefix cache and its video in the processor's cache, and jumps the
queue before its cache is evicted. Several thoughts are one request that shares the prompt's cache, drawn as rollouts
are, and then one request for the reward of each.

The reward comes out as the logit of `<Reward>`, whose own value nobody needs because the policy can never draw the
token: `compute_logits` replaces it by the head's product with the final hidden state, both in fp32. Unlike a head
stored as a row of the output layer, it stays in fp32 if the model runs in bf16, in every version of vLLM, and tied
embeddings stay tied.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from descore.base_models import find_model_class
from scoring.types import ScoringEngine, ScoringSettings, ThoughtScore
from verl.config import RolloutConfig
from verl.model.reward_files import PolicyCheckpoint
from verl.rollout.draws import DeviceDraws, can_draw_on
from verl.rollout.engine import video_seed
from verl.rollout.shared_prompt import choose_backend
from verl.rollout.vllm_engine import hand_over
from verl.rollout.vllm_prompts import PromptForm, add_request, require_same_prompt
from verl.rollout.vllm_start import forbidding, prepare_environment, process_state_kept, start_llm
from verl.types import VideoPrompt

HEAD_NAME = "rm_head.weight"
CPU_KV_CACHE_GIB = 2
PROCESSOR_CACHE_GB = 4
"""For preprocessed videos between their two requests, on the host."""
SCORING, THINKING = 0, 1
"""Priorities: the lower is served first."""


@dataclass(frozen=True)
class _Request:
    """A request for chains of thought while `cot_ids` is None, then one for the reward of the `sample`-th."""

    name: str
    prompt: VideoPrompt
    video_id: str
    num_thoughts: int
    sample: int = 0
    cot_ids: tuple[int, ...] | None = None
    is_finished: bool = True


class VllmScorer(ScoringEngine):
    """`cached_tokens`, `prompt_tokens`: over all scoring requests, tokens found in the prefix cache and all tokens."""

    is_continuous = True

    def __init__(
        self, folder: Path, checkpoint: PolicyCheckpoint, settings: ScoringSettings, device: torch.device
    ) -> None:
        super().__init__(checkpoint, settings)
        self.cached_tokens = self.prompt_tokens = 0
        self._numbers = itertools.count()
        self._requests: dict[str, _Request] = {}
        self._scores: dict[str, dict[int, ThoughtScore]] = {}  # by video id, of unfinished videos, by sample
        config = RolloutConfig(
            n=max(2, settings.num_thoughts),
            shared_prompt_decoding=settings.num_thoughts > 1,
            quantization=None if settings.quantization == "none" else settings.quantization,
            kv_cache_dtype=settings.kv_cache_dtype,
            precision=settings.precision,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_num_seqs=settings.batch_size,
            enforce_eager=settings.enforce_eager,
            kv_cache_gib=settings.kv_cache_gib or (CPU_KV_CACHE_GIB if device.type == "cpu" else None),
        )
        prepare_environment(config, device)
        draws = DeviceDraws(device) if can_draw_on(device) else None
        processors = [forbidding(self.forbidden_token_ids)] + ([draws.logits_processor()] if draws else [])
        with process_state_kept(device):
            architecture = register_reward_model(checkpoint.config)
            sharing = choose_backend(config, device) if config.shared_prompt_decoding else {}
            self.llm = start_llm(
                folder,
                config,
                self.max_model_len,
                self.forbidden_token_ids,
                device,
                hf_overrides={"architectures": [architecture], "reward_token_id": self.reward_token_id},
                logprobs_mode="raw_logits",
                scheduling_policy="priority",
                mm_processor_cache_gb=PROCESSOR_CACHE_GB,
                logits_processors=processors,
                **sharing,
            )
        if draws:
            draws.install(self.llm)
        self.form = PromptForm(folder, self.llm.get_tokenizer(), device)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        hand_over(self.llm, itertools.chain(weights, [(HEAD_NAME, self.head_weight)]))

    def submit(self, name: str, prompt: VideoPrompt, num_thoughts: int) -> None:
        self.form.learn(prompt, self.llm)
        request = _Request(name, prompt, f"video-{next(self._numbers)}", num_thoughts)
        self._scores[request.video_id] = {}
        self._add(request if num_thoughts else replace(request, cot_ids=()))

    def step(self) -> list[tuple[str, tuple[ThoughtScore, ...]]]:
        """Raises ValueError if vLLM reads other tokens than the trainer does."""
        ready = []
        for output in filter(lambda output: output.finished, self.llm.llm_engine.step()):
            request = self._requests.pop(output.request_id)
            require_same_prompt(request.prompt, output.prompt_token_ids, self._continuation(request))
            if request.cot_ids is None:
                for completion in output.outputs:
                    ids = tuple(completion.token_ids)
                    is_finished = bool(ids) and ids[-1] == self.eos_token_id
                    cot_ids = ids[:-1] if is_finished else ids
                    self._add(replace(request, sample=completion.index, cot_ids=cot_ids, is_finished=is_finished))
            else:
                self.cached_tokens += output.num_cached_tokens or 0
                self.prompt_tokens += len(output.prompt_token_ids)
                reward = output.outputs[0].logprobs[0][self.reward_token_id].logprob
                scores = self._scores[request.video_id]
                scores[request.sample] = ThoughtScore(request.cot_ids, request.is_finished, float(reward))
                if len(scores) == max(1, request.num_thoughts):
                    del self._scores[request.video_id]
                    ready.append((request.name, tuple(scores[sample] for sample in sorted(scores))))
        return ready

    @property
    def num_unfinished(self) -> int:
        return len(self._scores)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _add(self, request: _Request) -> None:
        """Hand a request to vLLM."""
        content = self.form.request(
            request.prompt, video_id=request.video_id, continuation=self._continuation(request)
        )
        is_thinking = request.cot_ids is None
        parameters = self.thinking_parameters(request) if is_thinking else self._scoring_parameters()
        request_id = f"request-{next(self._numbers)}"
        add_request(self.llm, request_id, content, parameters, priority=THINKING if is_thinking else SCORING)
        self._requests[request_id] = request

    def _continuation(self, request: _Request) -> tuple[int, ...]:
        """What follows the prompt."""
        return () if request.cot_ids is None else (*request.cot_ids, self.reward_token_id)

    def thinking_parameters(self, request: _Request):
        """Sampling parameters of the chains of thought of a video."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self.sampling(request.num_thoughts)
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            seed=video_seed(sampling, request.prompt.key),  # vLLM adds the sample's number
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            ignore_eos=True,
            stop_token_ids=[self.eos_token_id],  # and none from generation_config.json
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _scoring_parameters(self):
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            seed=0,  # unused, but our draw wants one of every request that shares a batch with drawn thoughts
            max_tokens=1,
            logprob_token_ids=[self.reward_token_id],
            ignore_eos=True,
            detokenize=False,
        )


def register_reward_model(config) -> str:
    """Register the Qwen3-VL of `config` with its reward head with vLLM in this process; returns its architecture."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe

    name = find_model_class(config, "the model").__name__
    base = getattr(qwen3_vl, name, None) or getattr(qwen3_vl_moe, name)

    class WithRewardHead(base):
        """Its config's `reward_token_id` says which logit is the reward."""

        def __init__(self, *, vllm_config, prefix: str = "model") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            config = vllm_config.model_config.hf_config
            self.reward_token_id = config.reward_token_id
            self.rm_head = torch.nn.Linear(config.text_config.hidden_size, 1, bias=False, dtype=torch.float32)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
            """Logits fp32 [num_positions, vocab] of hidden states [num_positions, hidden] after the final norm."""
            logits = super().compute_logits(hidden_states)
            if logits is None:  # on a rank that does not sample
                return None
            logits = logits.float()  # what vLLM's sampler does next
            logits[:, self.reward_token_id] = (hidden_states.float() * self.rm_head.weight[0]).sum(dim=1)
            return logits

    architecture = name.replace("For", "RewardFor")
    ModelRegistry.register_model(architecture, WithRewardHead)
    return architecture
