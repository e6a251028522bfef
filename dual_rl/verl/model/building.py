"""From a checkpoint to a PolicyModel.

Parameters are made on the meta device, so that a sharded model never exists whole on one device; `initial_state`
returns the values to load into it.
"""

import copy

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from descore.base_models import find_model_class
from verl.config import ModelConfig
from verl.data.scored_sequence import forbidden_token_ids, reward_token_id
from verl.model.attention import use_shared_prompt_attention
from verl.model.policy import ADAPTER, PolicyModel
from verl.model.reward_files import PolicyCheckpoint

LANGUAGE_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


def build_policy(
    checkpoint: PolicyCheckpoint,
    settings: ModelConfig,
    *,
    frozen_dtype: torch.dtype = torch.float32,
    is_reference: bool = False,
) -> PolicyModel:
    """A PolicyModel with the backbone's parameters on the meta device; everything else is real.

    Trained parameters are fp32, frozen ones of the backbone `frozen_dtype`. `is_reference`: nothing is trained.
    """
    # Otherwise the model without its adapter would not be the reference.
    assert not settings.lora.rank or settings.freeze_vision_tower, "LoRA needs a frozen vision tower"
    with init_empty_weights(include_buffers=False):
        config = copy.deepcopy(checkpoint.config)
        backbone = find_model_class(config, settings.model_path)(config)
        backbone.requires_grad_(False)
        if settings.lora.rank > 0:
            lora = LoraConfig(r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=LANGUAGE_LINEARS)
            backbone = inject_adapter_in_model(lora, backbone, adapter_name=ADAPTER)
    use_shared_prompt_attention(backbone.config)
    backbone.generation_config = checkpoint.generation_config
    model = PolicyModel(
        backbone,
        reward_token_id=reward_token_id(checkpoint.processor.tokenizer),
        reward_embedding=checkpoint.reward_embedding,
        head_weight=checkpoint.head_weight,
        forbidden_ids=forbidden_token_ids(checkpoint.processor, backbone.get_input_embeddings().num_embeddings),
    )
    if is_reference:
        model.requires_grad_(False)
    else:
        _choose_trained(model, settings)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.float32 if parameter.requires_grad else frozen_dtype
            if parameter.dtype != dtype and parameter.is_meta:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad))
    backbone.tie_weights()
    if settings.enable_gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _choose_trained(model: PolicyModel, settings: ModelConfig) -> None:
    for name, parameter in model.backbone.named_parameters():
        if settings.lora.rank > 0:
            parameter.requires_grad_("lora_" in name)
        else:
            parameter.requires_grad_(not (settings.freeze_vision_tower and name.startswith("model.visual.")))
    model.reward_embedding.requires_grad_(settings.trainable_head)
    model.rm_head.requires_grad_(settings.trainable_head)


def initial_state(model: PolicyModel, checkpoint: PolicyCheckpoint) -> dict[str, torch.Tensor]:
    """Initial values of the parameters of a model from `build_policy`, by name, whole and on the CPU.

    All but LoRA's, which `PolicyModel.initialize_adapters` sets. Tensors are shared with `checkpoint`.
    """
    assert checkpoint.weights is not None, "the checkpoint was read without its weights"
    head = {"reward_embedding": checkpoint.reward_embedding, "rm_head.weight": checkpoint.head_weight}
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    return {name: head[name] if name in head else checkpoint.weights[model.hub_name(name)] for name in names}
