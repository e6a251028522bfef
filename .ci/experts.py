"""A mixture of experts out of a dense Qwen3-VL, for the tests of both stages."""

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

NUM_EXPERTS, NUM_CHOSEN = 4, 2


@torch.no_grad()
def with_experts(dense: Qwen3VLForConditionalGeneration, *, spread: float = 1.0) -> Qwen3VLMoeForConditionalGeneration:
    """Each MLP becomes four experts, of which every token takes two; the rest of the weights is the same.

    `spread`: how far experts differ from the MLP and each other, in deviations of its weights; 0 makes copies.
    """
    values = dense.config.to_dict()
    text = values["text_config"] | {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": True}
    text |= {"num_experts": NUM_EXPERTS, "num_experts_per_tok": NUM_CHOSEN}
    text["moe_intermediate_size"] = text["intermediate_size"]
    vision = values["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    values |= {"model_type": "qwen3_vl_moe", "architectures": [Qwen3VLMoeForConditionalGeneration.__name__]}
    config = Qwen3VLMoeConfig(**{**values, "text_config": text, "vision_config": vision})
    model, state = Qwen3VLMoeForConditionalGeneration(config).to(dense.dtype), dense.state_dict()
    generator = torch.Generator().manual_seed(0)

    def spread_out(weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(NUM_EXPERTS, *weight.shape, generator=generator)
        return (weight + spread * weight.float().std() * noise).to(weight.dtype)

    for layer in range(text["num_hidden_layers"]):
        mlp = f"model.language_model.layers.{layer}.mlp."
        gate, up, down = (state.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{mlp}experts.gate_up_proj"] = torch.cat([spread_out(gate), spread_out(up)], dim=1)
        state[f"{mlp}experts.down_proj"] = spread_out(down)
        router = torch.randn(NUM_EXPERTS, text["hidden_size"], generator=generator) / text["hidden_size"] ** 0.5
        state[f"{mlp}gate.weight"] = router.to(gate.dtype)
    model.load_state_dict(state)
    model.generation_config = dense.generation_config
    return model
