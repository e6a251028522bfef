"""Qwen3-VL as policy and reward model in one: a single packed forward gives log-probs and rewards.

The module is the root of FSDP2 (`fully_shard` on each text layer, each vision block and the root, with
`reward_embedding` and `rm_head` ignored and replicated), so all computation is inside `forward` or `encode_videos`,
where the root's weights are whole. Weights of the backbone may arrive in bf16 (mixed precision); head, rewards,
log-probs and entropy are always fp32.

The `<Reward>` row is a parameter of its own that replaces the token's embedding, as in stage 1. Of a mixture of
experts, the router's auxiliary loss is left out, as is usual in RL: it would pull the policy off its objective.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from verl.core.objective import PolicyOutput
from verl.core.packing import PackedGroups
from verl.core.token_log_probs import Distributions, compute_token_log_probs
from verl.model.attention import compile_around_attention
from verl.model.ulysses import RowPart

ADAPTER = "default"


class PolicyModel(nn.Module):
    """`backbone`: Qwen3-VL, dense or with experts, with shared-prompt attention, LoRA layers injected or not.

    `reward_embedding`: fp32 [hidden], the row of `reward_token_id`. `rm_head`: bias-free Linear(hidden, 1) in fp32.
    `forbidden_ids`: tokens that the policy can never draw. `sequence_group`: the ranks that share each row, set after
    construction; all of them call the model with the same row and get the same scores.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        reward_token_id: int,
        reward_embedding: torch.Tensor,
        head_weight: torch.Tensor,
        forbidden_ids: Sequence[int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        backbone.model.language_model._deepstack_process = _add_vision_features
        self.sequence_group: ProcessGroup | None = None
        self.is_compiled = False
        self.reward_token_id = reward_token_id
        self.reward_embedding = nn.Parameter(reward_embedding.detach().float().clone())
        self.rm_head = nn.Linear(head_weight.shape[1], 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.rm_head.weight.copy_(head_weight)
        self.register_buffer("forbidden_ids", torch.tensor(list(forbidden_ids)), persistent=False)

    def encode_videos(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """The vision tower over all videos at once; with gradient only if it is tuned.

        `pixel_values`: [patches of all, patch_dim]. `grid_thw`: int64 [num_videos, 3]. Returns [1 + D, N, hidden] for
        N merged tokens (patches / merge_size ** 2): the embeddings of the video tokens, and for each of the first D
        text layers what is added to its output at these tokens (DeepStack).
        """
        visual = self.backbone.model.visual
        is_tuned = any(parameter.requires_grad for parameter in visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_tuned):
            output = visual(
                pixel_values.to(visual.patch_embed.proj.weight.dtype),
                grid_thw=grid_thw.to(pixel_values.device),
                return_dict=True,
            )
        return torch.stack([output.pooler_output, *output.deepstack_features])

    def forward(
        self,
        batch: PackedGroups,
        vision: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        temperature: float | None,
        ref_distributions: Distributions | None = None,
        return_distributions: bool = False,
    ) -> PolicyOutput:
        """Log-probs and rewards of a row.

        `vision`: what `encode_videos` returns for the row's videos; without it `pixel_values` are encoded here.
        `temperature`: of the policy distribution, 0 (greedy) counting as 1; None leaves out the language head and
        gives rewards only. `ref_distributions`: of the same row, adds the full KL.
        """
        if vision is None:
            assert pixel_values is not None, "the forward needs vision features or pixel values"
            vision = self.encode_videos(pixel_values, torch.tensor(batch.grid_thw))
        part = None
        if self.sequence_group is not None:
            part = RowPart(batch, self.sequence_group)
            batch, vision = part.batch, vision.index_select(1, part.videos)
        hidden = self._compute_hidden_states(batch, vision, part)
        output = PolicyOutput(hidden[batch.reward_positions].float() @ self.rm_head.weight.float()[0])
        if temperature is not None:
            states, head_weight = hidden[batch.label_positions], self.backbone.lm_head.weight
            scores = compute_token_log_probs(
                states,
                head_weight,
                batch.labels,
                temperature=temperature,
                forbidden_ids=self.forbidden_ids,
                reference=ref_distributions,
                is_compiled=self.is_compiled,
            )
            distributions = None
            if return_distributions:  # a copy of the head: FSDP may free the whole weight after the forward
                own_head = None if self.adapters else head_weight.detach().clone()
                distributions = Distributions(states.detach(), own_head)
            output = PolicyOutput(output.rewards, *scores, distributions)
        return output if part is None else part.join(output)

    def _compute_hidden_states(self, batch: PackedGroups, vision: torch.Tensor, part: RowPart | None) -> torch.Tensor:
        """Final normed hidden states of the row, [T, hidden]."""
        embeddings = self.backbone.get_input_embeddings()(batch.input_ids.unsqueeze(0))
        row = self.reward_embedding.to(embeddings.dtype).expand(1, len(batch.reward_positions), -1)
        embeddings = embeddings.index_copy(1, batch.reward_positions, row)
        videos, *deepstack = vision.to(embeddings.dtype).unbind()
        embeddings = embeddings.index_copy(1, batch.video_positions, videos.unsqueeze(0))  # no view: one compilation
        output = self.backbone.model.language_model(
            inputs_embeds=embeddings,
            position_ids=batch.position_ids.unsqueeze(1),
            visual_pos_masks=batch.video_positions,
            deepstack_visual_embeds=deepstack,
            layout=batch.layout,
            row_part=part,
            use_cache=False,
        )
        return output.last_hidden_state.squeeze(0)

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        return self.backbone.model.language_model.layers

    def compile_layers(self) -> None:
        """Fuse everything between the matrix products of the text layers and of the log-probs (torch.compile).

        Attention stays as it is. Call once, sharded or not; the first passes take a minute longer.
        """
        compile_around_attention()
        for layer in self.text_layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        self.is_compiled = True

    @property
    def adapters(self) -> dict[str, LoraLayer]:
        """LoRA layers by name within the backbone; none in full fine-tuning."""
        return {name: module for name, module in self.backbone.named_modules() if isinstance(module, LoraLayer)}

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within it the model is the reference: LoRA off."""
        assert self.adapters, "a model without an adapter needs a reference model of its own"
        # peft's enable_adapters also changes requires_grad, which FSDP2 has already read.
        for layer in self.adapters.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.adapters.values():
                layer._disable_adapters = False

    @torch.no_grad()
    def initialize_adapters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Initialise fresh LoRA weights as PEFT does: A uniform in +-1 / sqrt(inputs), B zero.

        `parameters`: by name in this model, sharded (then collective) or not. Values depend on the name only.
        """
        for name, parameter in parameters.items():
            assert ".lora_" in name, f"{name} is not an adapter weight and was given no value"
            whole = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                whole.uniform_(-bound, bound, generator=generator)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                sharded = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)
                parameter.to_local().copy_(sharded.to_local())
            else:
                parameter.copy_(whole)

    @property
    def embedding_weight(self) -> nn.Parameter:
        """[vocab, hidden]; its `<Reward>` row is not used, `reward_embedding` is."""
        return self.backbone.get_input_embeddings().weight

    def hub_name(self, name: str) -> str:
        """Name that a parameter of the backbone (or of this model) has in a plain Hugging Face checkpoint."""
        return name.removeprefix("backbone.").replace(".base_layer.", ".")

    def sharding_units(self) -> list[nn.Module]:
        """The modules that FSDP2 shards one by one, before the root: text layers and vision blocks."""
        return [*self.text_layers, *self.backbone.model.visual.blocks]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """The parameters that FSDP2 does not manage: small, fp32, whole on every rank."""
        return [self.reward_embedding, self.rm_head.weight]


def _add_vision_features(hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Replaces transformers' `_deepstack_process`: takes positions in a row, int64 [N], besides a mask [batch, T].

    Finding the positions of a mask waits for the GPU. `hidden`: [1 or batch, T, hidden]. `features`: [N, hidden].
    """
    features = features.to(hidden.dtype)
    if where.dtype == torch.bool:
        positions = where.flatten().nonzero().squeeze(1)
        return hidden.flatten(0, 1).index_add(0, positions, features).view_as(hidden)
    return hidden.index_add(1, where, features.unsqueeze(0))
