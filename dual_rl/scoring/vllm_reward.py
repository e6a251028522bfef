"""Qwen3-VL with its reward head as a model of vLLM: the reward comes out as the logit of `<Reward>`.

`compute_logits` puts the head's product with the final hidden state, both in fp32, in the place of `<Reward>`'s logit,
whose own value nobody needs because the policy can never draw the token. So the engine that writes the chain of
thought also scores it, with one copy of the weights. Unlike a head stored as a row of the output layer, it stays in
fp32 where the model runs in bf16, in every version of vLLM, and tied embeddings stay tied.
"""

from collections.abc import Iterable, Iterator

import torch

ARCHITECTURE = "Qwen3VLRewardForConditionalGeneration"
HEAD_NAME = "rm_head.weight"


def register_reward_model() -> None:
    """Make the model known to vLLM in this process under `ARCHITECTURE`."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    class Qwen3VLRewardForConditionalGeneration(Qwen3VLForConditionalGeneration):
        """Its config's `reward_token_id` says which logit is the reward."""

        def __init__(self, *, vllm_config, prefix: str = "model") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            config = vllm_config.model_config.hf_config
            self.reward_token_id = config.reward_token_id
            self.rm_head = torch.nn.Linear(config.text_config.hidden_size, 1, bias=False, dtype=torch.float32)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
            """Logits fp32 [num_positions, vocab] of hidden states [num_positions, hidden] after the final norm."""
            logits = super().compute_logits(hidden_states)
            if logits is None:  # of a rank that does not sample
                return None
            logits = logits.float()  # what vLLM's sampler does next
            logits[:, self.reward_token_id] = (hidden_states.float() * self.rm_head.weight[0]).sum(dim=1)
            return logits

    ModelRegistry.register_model(ARCHITECTURE, Qwen3VLRewardForConditionalGeneration)


def with_head(
    weights: Iterable[tuple[str, torch.Tensor]], head_weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights and its head's, fp32 [1, hidden], as this model loads them."""
    yield from weights
    yield HEAD_NAME, head_weight
