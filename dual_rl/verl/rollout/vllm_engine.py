"""vLLM in the training process: started without weights, fed in memory, asleep during the update.

One path for vLLM 0.24 to 0.32, on GPUs and CPUs. A request is one video with its n responses: its frames are
preprocessed once, and the responses share the prompt's cache. Forbidden tokens are masked in the logits for all
requests at once; a `logit_bias` dictionary for each request would be rebuilt with every change of the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from descore.base_models import as_in_files
from verl.config import RolloutConfig
from verl.rollout.draws import DeviceDraws, can_draw_on
from verl.rollout.engine import check_lengths, response_seed, video_seed
from verl.rollout.shared_prompt import choose_backend
from verl.rollout.vllm_prompts import PromptForm, add_request, require_same_prompt
from verl.rollout.vllm_start import forbidding, prepare_environment, process_state_kept, random_state_kept, start_llm
from verl.types import Response, ResponseKey, Sampling, VideoPrompt

EMBEDDING_NAME = "model.language_model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"
DISCARD_WEIGHTS = 2
"""vLLM's sleep level that frees weights and cache without a copy in host memory."""


class VllmEngine:
    """`RolloutEngine` with vLLM; arguments as of `verl.rollout.engine.build_engine`."""

    def __init__(
        self,
        folder: Path,
        *,
        config: RolloutConfig,
        max_model_len: int,
        forbidden_token_ids: Sequence[int],
        eos_token_id: int,
        device: torch.device,
    ) -> None:
        self.max_model_len = max_model_len
        self.eos_token_id = eos_token_id
        self.can_sleep = device.type == "cuda"
        self.num_videos = 0
        prepare_environment(config, device)
        self.draws = DeviceDraws(device) if can_draw_on(device) else None
        processors = [forbidding(forbidden_token_ids)] + ([self.draws.logits_processor()] if self.draws else [])
        with process_state_kept(device):
            arguments = {"logits_processors": processors, **choose_backend(config, device)}
            self.llm = start_llm(folder, config, max_model_len, forbidden_token_ids, device, **arguments)
        if self.draws:
            self.draws.install(self.llm)
        self.form = PromptForm(folder, self.llm.get_tokenizer(), device)

    def generate(self, prompts: Sequence[VideoPrompt], sampling: Sampling) -> list[list[Response]]:
        """See `RolloutEngine`. Raises ValueError when vLLM makes other token ids of a prompt than the trainer."""
        check_lengths(prompts, sampling, self.max_model_len)
        if not prompts:
            return []
        with random_state_kept():
            self.form.learn(prompts[0], self.llm)
        keys = [ResponseKey(*prompt.key, sample) for prompt in prompts for sample in range(sampling.n)]
        if self.draws:
            self.draws.begin([response_seed(sampling, key) for key in keys], max_tokens=sampling.max_tokens)
        with random_state_kept():
            outputs = self._run(
                (self._request(prompt) for prompt in prompts),
                [self._sampling_parameters(prompt, sampling) for prompt in prompts],
            )
        return self._read_outputs(prompts, outputs, sampling)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `RolloutEngine`."""
        hand_over(self.llm, weights)
        self._forget()

    def sleep(self) -> None:
        """See `RolloutEngine`; nothing on CPUs."""
        if self.can_sleep:
            self._forget()
            self.llm.sleep(level=DISCARD_WEIGHTS)

    def wake(self) -> None:
        """See `RolloutEngine`; nothing on CPUs."""
        if self.can_sleep:
            self.llm.wake_up()
            self.llm.collective_rpc(_zero_deepstack_buffers)

    def close(self) -> None:
        """See `RolloutEngine`."""
        self.llm.llm_engine.engine_core.shutdown()

    def _forget(self) -> None:
        """Drop everything computed with the current weights."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def _run(self, requests: Iterable[dict], parameters: Iterable) -> list:
        """vLLM's outputs of requests, in their order. The engine takes a step after each request, so that it reads
        one prompt while the next is made. Batches do not depend on time: ranks that share an engine make the same."""
        engine, finished, number = self.llm.llm_engine, {}, 0
        for number, (request, own) in enumerate(zip(requests, parameters, strict=True), start=1):
            add_request(self.llm, str(number), request, own)
            finished |= self._step()
        while engine.has_unfinished_requests():
            finished |= self._step()
        return [finished[str(index)] for index in range(1, number + 1)]

    def _step(self) -> dict[str, object]:
        """Outputs of the requests that finished in this step, by request id."""
        return {output.request_id: output for output in self.llm.llm_engine.step() if output.finished}

    def _request(self, prompt: VideoPrompt) -> dict:
        """vLLM's request for a prompt. Its video id is new each time: features must not outlive their weights."""
        self.num_videos += 1
        return self.form.request(prompt, video_id=f"video-{self.num_videos}")

    def _sampling_parameters(self, prompt: VideoPrompt, sampling: Sampling):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        is_greedy = sampling.temperature == 0
        return SamplingParams(
            n=1 if is_greedy else sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            seed=None if is_greedy else video_seed(sampling, prompt.key),  # vLLM adds the sample's number
            logprobs=0 if is_greedy or not self.draws else None,  # of the drawn token only
            ignore_eos=True,
            stop_token_ids=[self.eos_token_id],  # and none of generation_config.json
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _read_outputs(self, prompts: Sequence[VideoPrompt], outputs: Sequence, sampling: Sampling) -> list:
        drawn = self.draws.end() if self.draws and sampling.temperature > 0 else {}
        responses = []
        for prompt, output in zip(prompts, outputs, strict=True):
            require_same_prompt(prompt, output.prompt_token_ids)
            completions = sorted(output.outputs, key=lambda completion: completion.index)
            if sampling.temperature == 0:
                completions = completions * sampling.n
            assert len(completions) == sampling.n, f"{len(completions)} responses instead of {sampling.n}"
            keys = [ResponseKey(*prompt.key, sample) for sample in range(sampling.n)]
            log_probs = [drawn.get(response_seed(sampling, key)) for key in keys]
            responses.append(list(map(self._response, keys, completions, log_probs)))
        return responses

    def _response(self, key: ResponseKey, completion, log_probs: torch.Tensor | None) -> Response:
        """`log_probs`: of the tokens, perhaps with more after them; None where vLLM's completion has them."""
        ids = list(completion.token_ids)
        is_finished = bool(ids) and ids[-1] == self.eos_token_id
        if log_probs is None:
            pairs = zip(ids, completion.logprobs, strict=True)
            log_probs = torch.tensor([entry[token].logprob for token, entry in pairs], dtype=torch.float32)
        return Response(
            key=key,
            cot_ids=tuple(ids[:-1] if is_finished else ids),
            is_finished=is_finished,
            log_probs=log_probs[: len(ids)].clone(),
        )


def hand_over(llm, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace the weights of a `vllm.LLM`, in place; `weights` as of `RolloutEngine.load_weights`."""
    llm.collective_rpc(_forget_packed_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _as_vllm_reads(weights)})


def _as_vllm_reads(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as in files, and those of the output layer also where they are the embedding's, without a name.

    vLLM's reloading treats a tied output layer as one by itself: on CPUs it would keep what it packed at the start.
    """
    embedding, has_output_layer = None, False
    for name, tensor in weights:
        if name == EMBEDDING_NAME:
            embedding = tensor
        has_output_layer |= name == OUTPUT_NAME
        yield name, as_in_files(name, tensor)
    if not has_output_layer:
        assert embedding is not None, f"no weights for {EMBEDDING_NAME}"
        yield OUTPUT_NAME, embedding


def _forget_packed_experts(worker) -> None:
    """On CPUs vLLM 0.32 packs the weights of experts for its kernel, but only of a layer that has no kernel yet."""
    for module in worker.model_runner.model.modules() if worker.device.type == "cpu" else ():
        if hasattr(method := getattr(module, "quant_method", None), "moe_kernel"):
            method.moe_kernel = None


def _zero_deepstack_buffers(worker) -> None:
    """Restore what level 2 sleep forgets: the zeros in the model's deepstack buffers, which no state dict holds."""
    for buffer in getattr(worker.model_runner.model, "deepstack_input_embeds", None) or ():
        buffer.zero_()
