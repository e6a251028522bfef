"""The base models that can be trained and used: Qwen3-VL, dense or with a mixture of experts.

Experts are two weights of three dimensions in each layer. In memory they lie as matrices do, [experts, outputs,
inputs]; Qwen's files and vLLM have [experts, inputs, outputs].
"""

import torch
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

MODEL_CLASSES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}
"""By the `model_type` of their config."""
EXPERTS = ".mlp.experts."
LINEAR_ATTENTION = "its linear attention carries a state through the tokens, which packed rows cannot yet divide"
OLDER = "it numbers frames in another way, and its vision tower attends in windows and has no DeepStack features"
REASONS = {"qwen2_vl": OLDER, "qwen2_5_vl": OLDER, "qwen3_5": LINEAR_ATTENTION, "qwen3_5_moe": LINEAR_ATTENTION}
"""Why models that one might expect to work are refused."""


def find_model_class(config, source: object) -> type[PreTrainedModel]:
    """The class of a model with this config. Raises ValueError that says why the model in `source` is refused."""
    if config.model_type not in MODEL_CLASSES:
        reason = REASONS.get(config.model_type, "it is of another family")
        raise ValueError(
            f"{source} is a {config.model_type!r} model, which is not supported: {reason}. Give a Qwen3-VL one "
            f"({' or '.join(MODEL_CLASSES)})."
        )
    return MODEL_CLASSES[config.model_type]


def as_in_files(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight in memory as files and vLLM have it: a view, transposed if it is of experts."""
    return weight.transpose(1, 2) if EXPERTS in name else weight
