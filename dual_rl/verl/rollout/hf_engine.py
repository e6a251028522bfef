"""Rollouts with transformers' own `generate`: for machines without vLLM, and to test the vLLM engine against.

The engine holds its own copy of the model, in evaluation mode and without gradients. It is simple rather than fast:
prompts are left padded, and each response has its own copy of the prompt.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from descore.base_models import find_model_class
from verl.config import RolloutConfig
from verl.data.scored_sequence import SequenceBuilder
from verl.model.precision import resolve_precision
from verl.rollout.engine import check_lengths, response_seed
from verl.types import Response, ResponseKey, Sampling, VideoPrompt


class HfEngine:
    """`RolloutEngine` with transformers; arguments as of `verl.rollout.engine.build_engine`."""

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
        assert config.tensor_parallel_size == 1, "this engine has no tensor parallelism"
        self.max_model_len = max_model_len
        self.eos_token_id = eos_token_id
        self.device = device
        self.dtype = resolve_precision(config.precision, device)
        self.max_num_rows = config.max_num_seqs
        self.forbidden_token_ids = torch.tensor(list(forbidden_token_ids), dtype=torch.long, device=device)
        self.builder = SequenceBuilder(AutoProcessor.from_pretrained(folder))
        with torch.device(device), init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(folder)
            self.model = find_model_class(config, folder)._from_config(
                config, dtype=self.dtype, attn_implementation="sdpa"
            )
        self.model.requires_grad_(False).eval()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `RolloutEngine`."""
        self.sleep()
        state = {
            name: torch.nn.Parameter(tensor.detach().to(self.device, self.dtype, copy=True), requires_grad=False)
            for name, tensor in weights
        }
        result = self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        assert not result.unexpected_keys, f"the model has no {', '.join(result.unexpected_keys[:3])}"
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        assert not missing, f"no weights for {', '.join(missing[:3])}"

    def sleep(self) -> None:
        """See `RolloutEngine`."""
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta")
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))

    def wake(self) -> None:
        """See `RolloutEngine`; `load_weights` takes the memory."""

    def close(self) -> None:
        """See `RolloutEngine`; nothing to end."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[VideoPrompt], sampling: Sampling) -> list[list[Response]]:
        """See `RolloutEngine`."""
        check_lengths(prompts, sampling, self.max_model_len)
        batch_size = max(1, self.max_num_rows // sampling.n)
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        return [responses for batch in batches for responses in self._generate_batch(batch, sampling)]

    def _generate_batch(self, prompts: Sequence[VideoPrompt], sampling: Sampling) -> list[list[Response]]:
        keys = [ResponseKey(*prompt.key, sample) for prompt in prompts for sample in range(sampling.n)]
        draws = SeededDraws(sampling, keys, forbidden_token_ids=self.forbidden_token_ids)
        inputs = self.left_padded([prompt for prompt in prompts for _ in range(sampling.n)])
        output = self.model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([draws]),
            generation_config=GenerationConfig(
                do_sample=False,  # `draws` leaves one token to choose
                max_new_tokens=sampling.max_tokens,
                eos_token_id=self.eos_token_id,
                pad_token_id=self.builder.tokenizer.pad_token_id,
            ),
        )
        generated = output[:, inputs["input_ids"].shape[1] :].tolist()
        log_probs = torch.stack(draws.log_probs, dim=1).float().cpu()
        responses = [self._response(key, ids, row) for key, ids, row in zip(keys, generated, log_probs, strict=True)]
        return [responses[start : start + sampling.n] for start in range(0, len(responses), sampling.n)]

    def _response(self, key: ResponseKey, ids: list[int], log_probs: torch.Tensor) -> Response:
        is_finished = self.eos_token_id in ids
        length = ids.index(self.eos_token_id) if is_finished else len(ids)
        return Response(
            key=key,
            cot_ids=tuple(ids[:length]),
            is_finished=is_finished,
            log_probs=log_probs[: length + int(is_finished)].clone(),
        )

    def left_padded(
        self, prompts: Sequence[VideoPrompt], continuations: Sequence[Sequence[int]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs of transformers' `generate` and forward; token tensors int64 [num_prompts, longest].

        `continuations`: ids that follow each prompt, none by default.
        """
        continuations = [()] * len(prompts) if continuations is None else continuations
        rows = [
            torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.long)])
            for prompt, ids in zip(prompts, continuations, strict=True)
        ]
        longest = max(row.numel() for row in rows)
        input_ids = torch.full((len(prompts), longest), self.builder.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, longest - row.numel() :] = row
            attention_mask[index, longest - row.numel() :] = 1
        pixel_values = {prompt.key: self.builder.pixel_values(prompt, self.device) for prompt in prompts}
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == self.builder.processor.video_token_id).int() * 2,
            "pixel_values_videos": torch.cat([pixel_values[prompt.key] for prompt in prompts]).to(self.dtype),
            "video_grid_thw": torch.tensor([prompt.grid_thw for prompt in prompts]),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


class SeededDraws(LogitsProcessor):
    """Draws the next token of each row with the row's own generator, and keeps its log-probability.

    It returns the logit 0 at the drawn token and minus infinity elsewhere, so that greedy search takes that token.
    `log_probs`: one tensor [num_rows] for each step so far.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[ResponseKey], *, forbidden_token_ids: torch.Tensor) -> None:
        self.is_greedy = sampling.temperature == 0
        self.forbidden_token_ids = forbidden_token_ids
        self.log_probs: list[torch.Tensor] = []
        self.generators = [torch.Generator().manual_seed(response_seed(sampling, key)) for key in keys]
        self.processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self.is_greedy:
            self.processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            self.processors.extend([TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else [])
            self.processors.extend([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores`: logits [num_rows, vocab]; returns fp32 of the same shape."""
        allowed = scores.float().index_fill(1, self.forbidden_token_ids, -torch.inf)
        log_probs = torch.log_softmax(self.processors(input_ids, allowed), dim=-1)
        noisy = log_probs if self.is_greedy else log_probs + self._gumbel_noise(log_probs)
        drawn = noisy.argmax(dim=-1, keepdim=True)
        self.log_probs.append(log_probs.gather(1, drawn).squeeze(1))
        return torch.full_like(log_probs, -torch.inf).scatter(1, drawn, 0.0)

    def _gumbel_noise(self, log_probs: torch.Tensor) -> torch.Tensor:
        """-log of exponential noise [num_rows, vocab]: the argmax of log-probs with it added is a draw from them."""
        rows = [torch.empty(log_probs.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return -torch.stack(rows).log().to(log_probs.device)
