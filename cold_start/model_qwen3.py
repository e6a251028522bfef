"""Qwen3-VL as a reward model: `<Reward>` row, linear head, LoRA, and one packed forward without vocabulary logits.

The `<Reward>` row is a parameter of its own that replaces the embedding at the token's position. PEFT's layer for
trainable tokens computes the same, but copies the whole embedding matrix in each forward pass and builds a dense
gradient of its size in each backward pass. Checkpoints store the row where PEFT looks for it (see checkpoint.py).

Of a mixture of experts, the router's auxiliary loss is left out, as in stage 2: rewards alone decide.

Precision: frozen weights are kept in the compute dtype, everything trained is fp32 (its own master copy) and enters
matrix products through autocast. The head always computes in fp32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from arguments import ModelArguments, RewardTokenMode
from attention import use_packed_attention
from descore.base_models import find_model_class
from scored_sequence import REWARD_TOKEN, PackedSequences, reward_token_id

LANGUAGE_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
VISION_LINEARS = r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc(1|2))"
EMBEDDING_MODULE = "embed_tokens"
EMBEDDING_ROWS_MULTIPLE = 64
PEFT_PREFIX = "base_model.model."


class RewardModel(nn.Module):
    """A Qwen3-VL backbone with the `<Reward>` row and the reward head.

    `backbone`: Qwen3-VL, dense or with experts, or a PEFT model around it. `reward_embedding`: fp32 [hidden].
    `rm_head`: bias-free Linear(hidden, num_rewards) in fp32. `autocast_dtype`: of matrix products, None for the
    weights' own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        reward_embedding: torch.Tensor,
        num_rewards: int = 1,
        reward_token: RewardTokenMode = "special",
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reward_token = reward_token
        self.autocast_dtype = autocast_dtype
        self.qwen.language_model._deepstack_process = _add_vision_features
        hidden_size = self.qwen.config.text_config.hidden_size
        self.reward_embedding = nn.Parameter(reward_embedding.detach().float().clone())
        self.rm_head = nn.Linear(hidden_size, num_rewards, bias=False, dtype=torch.float32)
        nn.init.normal_(self.rm_head.weight, std=1.0 / (hidden_size + 1) ** 0.5)

    @property
    def generator(self) -> PreTrainedModel:
        """The model with its language head, LoRA layers included."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone

    @property
    def qwen(self) -> nn.Module:
        """The model without the language head (Qwen3VLModel)."""
        return self.generator.model

    @property
    def text_layers(self) -> nn.ModuleList:
        return self.qwen.language_model.layers

    def compile_layers(self) -> None:
        """Compile text layers and vision blocks, which fuses the work between their matrix products.

        Call once; the first passes take a minute or two longer. The inputs of the first layers must not be views, as
        those of the other layers are not: views would be compiled for separately.
        """
        self.qwen.visual.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        for layer in (*self.text_layers, *self.qwen.visual.blocks):
            layer.forward = torch.compile(layer.forward, dynamic=True)

    @property
    def device(self) -> torch.device:
        return self.rm_head.weight.device

    def forward(self, batch: PackedSequences) -> torch.Tensor:
        """Rewards, float32 [num_sequences, num_rewards]."""
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=self.autocast_dtype is not None
        )
        with autocast:
            hidden = self.compute_hidden_states(batch)
        with torch.autocast(self.device.type, enabled=False):
            pooled = _pool(hidden, batch, self.reward_token)
            return F.linear(pooled, self.rm_head.weight.float())

    def compute_hidden_states(self, batch: PackedSequences) -> torch.Tensor:
        """Final normed hidden states of a packed row, [T, hidden]. The vision tower runs once over all videos.

        Nothing here waits for the GPU, so that work is queued while the previous batch still runs.
        """
        qwen = self.qwen
        embeddings = qwen.get_input_embeddings()(batch.input_ids.unsqueeze(0))
        row = self.reward_embedding.to(embeddings.dtype).expand(1, batch.num_sequences, -1)
        embeddings = embeddings.index_copy(1, batch.reward_positions, row)
        vision = qwen.visual(
            batch.pixel_values.to(qwen.visual.dtype),
            grid_thw=batch.video_grid_thw,
            return_dict=True,
            **self._vision_layout(batch.video_grid_thw),
        )
        video_embeddings = vision.pooler_output.to(embeddings.dtype).unsqueeze(0)
        # The result is not a view, see compile_layers.
        embeddings = embeddings.index_copy(1, batch.video_positions, video_embeddings)
        output = qwen.language_model(
            inputs_embeds=embeddings,
            position_ids=batch.position_ids.unsqueeze(1),
            visual_pos_masks=batch.video_positions,
            deepstack_visual_embeds=vision.deepstack_features,
            cu_seq_lens_q=batch.cu_seq_lens,
            max_length_q=batch.max_seq_len,
            use_cache=False,
        )
        return output.last_hidden_state.squeeze(0)

    def _vision_layout(self, grid_thw: torch.Tensor) -> dict[str, torch.Tensor | int | None]:
        """What the vision tower would derive from its grid on the GPU, computed on the CPU, by argument name."""
        visual = self.qwen.visual
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.config.spatial_merge_size,
        )
        bounds, longest = get_vision_attention_seqlens(grid_thw, visual.config)
        layout = {
            "interp_indices": indices,
            "interp_weights": weights,
            "position_ids": get_vision_position_ids(grid_thw, visual.config.spatial_merge_size),
            "cu_seqlens": bounds,
        }
        return {name: _send(tensor, self.device) for name, tensor in layout.items()} | {"max_seqlen": longest}

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that receive gradients."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An asynchronous copy on `device`."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _add_vision_features(hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Replaces transformers' `_deepstack_process`: takes positions in the row, int64 [N], as well as a mask.

    Finding the positions of a mask waits for the GPU. `hidden`: [1, T, hidden] (with a mask [batch, T, hidden]);
    `features`: [N, hidden].
    """
    features = features.to(hidden.dtype)
    if where.dtype == torch.bool:
        positions = where.flatten().nonzero().squeeze(1)
        return hidden.flatten(0, 1).index_add(0, positions, features).view_as(hidden)
    return hidden.index_add(1, where, features.unsqueeze(0))


def _pool(hidden: torch.Tensor, batch: PackedSequences, mode: RewardTokenMode) -> torch.Tensor:
    """The state that the head reads, fp32 [num_sequences, hidden]."""
    if mode == "special":
        return hidden[batch.reward_positions].float()
    if mode == "last":
        return hidden[batch.cu_seq_lens[1:].long() - 1].float()
    lengths = torch.diff(batch.cu_seq_lens).long()
    owner = torch.repeat_interleave(torch.arange(batch.num_sequences, device=hidden.device), lengths)
    sums = hidden.new_zeros(batch.num_sequences, hidden.shape[-1], dtype=torch.float32)
    return sums.index_add(0, owner, hidden.float()) / lengths.unsqueeze(-1)


def quiet_libraries() -> None:
    """Only errors from transformers, and no progress bar while it loads weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def require_qwen3_vl(path: str) -> type[PreTrainedModel]:
    """The class of the Qwen3-VL model in `path` (a folder or a hub name); reads its config only.

    Raises ValueError that says why another model is refused.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a model that transformers can load: {str(error).splitlines()[0]}") from error
    return find_model_class(config, path)


def add_reward_token(processor) -> int:
    """Add `<Reward>` to the tokenizer if it is not there yet; returns its id."""
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    return reward_token_id(processor.tokenizer)


def load_backbone(path: str, *, dtype: torch.dtype, num_tokens: int) -> PreTrainedModel:
    """Load Qwen3-VL with packed attention and at least `num_tokens` embedding rows (the embedding never shrinks)."""
    backbone = require_qwen3_vl(path).from_pretrained(path, dtype=dtype)
    use_packed_attention(backbone.config)
    if backbone.get_input_embeddings().num_embeddings < num_tokens:
        backbone.resize_token_embeddings(num_tokens, pad_to_multiple_of=EMBEDDING_ROWS_MULTIPLE, mean_resizing=False)
    return backbone


def prepare_for_training(
    model: RewardModel, arguments: ModelArguments, *, autocast_dtype: torch.dtype | None = None
) -> RewardModel:
    """Freeze everything, add LoRA and unfreeze what the arguments ask for; trained weights become fp32. In place."""
    model.autocast_dtype = autocast_dtype
    model.backbone.requires_grad_(False)
    model.reward_embedding.requires_grad_(True)
    model.rm_head.requires_grad_(True)
    if arguments.uses_lora:
        targets = f"({LANGUAGE_LINEARS})|({VISION_LINEARS})" if arguments.vision_lora else LANGUAGE_LINEARS
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=targets,
        )
        model.backbone = get_peft_model(model.backbone, config)
        for module in model.backbone.modules():
            if isinstance(module, LoraLayer):
                # Autocast casts adapters to the input's dtype. PEFT would first cast the input to the adapters' fp32,
                # and autocast would cast it back: the same numbers for more memory traffic.
                module.cast_input_dtype_enabled = False
    elif not arguments.freeze_llm:
        model.qwen.language_model.requires_grad_(True)
        model.qwen.get_input_embeddings().requires_grad_(False)
    for name, parameter in model.qwen.visual.named_parameters():
        if "lora_" not in name:
            wanted = arguments.tune_merger if "merger" in name else not arguments.freeze_vision_tower
            parameter.requires_grad_(wanted)
    for _, parameter in model.trainable_parameters():
        parameter.data = parameter.data.float()
    if arguments.gradient_checkpointing:
        model.generator.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def parameter_groups(model: RewardModel, learning_rates: dict[str, float], *, weight_decay: float) -> list[dict]:
    """AdamW groups by part (`base`, `merger`, `vision`, `token`, `head`); vectors are not decayed."""
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.trainable_parameters():
        part = part_of(name)
        decayed = weight_decay > 0 and parameter.ndim > 1
        group = groups.setdefault(
            (part, decayed),
            {"name": part, "lr": learning_rates[part], "weight_decay": weight_decay * decayed, "params": []},
        )
        group["params"].append(parameter)
    return list(groups.values())


def part_of(name: str) -> str:
    """The part of RewardModel that a parameter belongs to, which decides its learning rate."""
    if name == "reward_embedding":
        return "token"
    if name.startswith("rm_head."):
        return "head"
    if ".visual." in name:
        return "merger" if "merger" in name else "vision"
    return "base"


def hub_name(name: str) -> str:
    """Name that a backbone parameter of RewardModel has in a plain Hugging Face checkpoint."""
    return name.removeprefix("backbone.").removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
