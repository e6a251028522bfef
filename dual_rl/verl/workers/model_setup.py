"""From a checkpoint on disk to a sharded actor, a reference, an optimizer and a rollout engine; and back to disk."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from descore.format_prompt import FormatPrompt
from verl.config import Config, FsdpConfig, ModelConfig
from verl.data.scored_sequence import SequenceBuilder, forbidden_token_ids
from verl.model.building import build_policy, initial_state
from verl.model.policy import PolicyModel
from verl.model.precision import resolve_precision
from verl.model.recompute import ActivationPlan
from verl.model.reward_files import (
    HEAD_FILE,
    PolicyCheckpoint,
    load_checkpoint,
    save_engine_folder,
    save_head,
    save_policy,
)
from verl.model.ulysses import build_sequence_group
from verl.rollout.engine import RolloutEngine, build_engine
from verl.types import VideoPrompt
from verl.workers.optimizer import build_optimizer
from verl.workers.parallel import Rank, iterate_weights, materialize, shard_model

logger = logging.getLogger(__name__)


@dataclass
class PolicyRuntime:
    """Everything a rank computes with.

    `reference`: None with LoRA, where the actor without its adapter is the reference. `activations`: None if no layer
    is recomputed, or all of them are. `copies`: how many ranks hold each pair and share its row.
    """

    rank: Rank
    checkpoint: PolicyCheckpoint
    builder: SequenceBuilder
    actor: PolicyModel
    reference: PolicyModel | None
    optimizer: torch.optim.Optimizer
    activations: ActivationPlan | None
    copies: int

    def pixel_values(self, prompts: Sequence[VideoPrompt]) -> torch.Tensor:
        """Normalised patches of all videos, one after the other, float32 [num_patches, patch_dim]."""
        return torch.cat([self.builder.pixel_values(prompt, self.rank.device) for prompt in prompts])

    @contextmanager
    def reference_policy(self) -> Iterator[PolicyModel]:
        """The reference policy, while the context lasts."""
        if self.reference is not None:
            yield self.reference
            return
        with self.actor.adapter_disabled():
            yield self.actor


def read_checkpoint(config: Config, *, with_weights: bool) -> PolicyCheckpoint:
    """The checkpoint that training starts from, with the overrides of the settings; warns about these.

    Raises ValueError when `ulysses_size` does not divide the attention heads.
    """
    settings, data = config.worker.actor.model, config.data
    checkpoint = load_checkpoint(settings.model_path, settings.head_path, with_weights=with_weights)
    num_heads, ranks = checkpoint.config.text_config.num_attention_heads, config.worker.actor.ulysses_size
    if num_heads % ranks:
        raise ValueError(
            f"worker.actor.ulysses_size={ranks} does not divide the {num_heads} attention heads of "
            f"{settings.model_path}. Choose a divisor."
        )
    limits = {"fps": data.video_fps, "min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    budget, format_prompt = checkpoint.video_budget.replace(**limits), checkpoint.format_prompt
    if data.format_prompt is not None:
        format_prompt = Path(data.format_prompt).read_text()
        FormatPrompt(format_prompt, source=data.format_prompt)
    if not torch.distributed.is_initialized():  # the driver: one warning is enough
        if budget != checkpoint.video_budget:
            logger.warning("the model was trained with %s, this run uses %s", checkpoint.video_budget, budget)
        if format_prompt != checkpoint.format_prompt:
            logger.warning("the model was trained with another format prompt than %s", data.format_prompt)
    return dataclasses.replace(checkpoint, video_budget=budget, format_prompt=format_prompt)


def build_runtime(checkpoint: PolicyCheckpoint, config: Config, rank: Rank) -> PolicyRuntime:
    """Build and shard everything. Only rank 0 needs a checkpoint with weights; it sends them to the others."""
    actor_config = config.worker.actor
    sequence_group = build_sequence_group(actor_config.ulysses_size)
    actor = _build_sharded(checkpoint, actor_config.model, actor_config.fsdp, rank=rank)
    actor.sequence_group = sequence_group
    reference = None
    if not config.algorithm.disable_kl and not actor_config.model.lora.rank:
        frozen = dataclasses.replace(actor_config.model, enable_gradient_checkpointing=False)
        reference = _build_sharded(checkpoint, frozen, config.worker.ref.fsdp, rank=rank, is_reference=True)
        reference.sequence_group = sequence_group
    activations = None
    if actor_config.model.enable_gradient_checkpointing and sequence_group is None:
        # Ranks that share a row repeat its exchanges together, so they would have to choose together.
        trained = [parameter for parameter in actor.parameters() if parameter.requires_grad]
        max_kept = actor_config.model.max_kept_layers
        activations = ActivationPlan(actor.text_layers, trained, rank.device, max_kept=max_kept)
    return PolicyRuntime(
        rank=rank,
        checkpoint=dataclasses.replace(checkpoint, weights=None),
        builder=SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt),
        actor=actor,
        reference=reference,
        optimizer=build_optimizer(actor, actor_config.optim),
        activations=activations,
        copies=actor_config.ulysses_size,
    )


def _build_sharded(
    checkpoint: PolicyCheckpoint, settings: ModelConfig, fsdp: FsdpConfig, *, rank: Rank, is_reference: bool = False
) -> PolicyModel:
    compute_dtype = resolve_precision(fsdp.precision, rank.device)
    model = build_policy(checkpoint, settings, frozen_dtype=compute_dtype, is_reference=is_reference)
    state = None if checkpoint.weights is None else initial_state(model, checkpoint)
    shard_model(model, fsdp, rank=rank, compute_dtype=compute_dtype)
    materialize(model, state, rank=rank, is_offloaded=fsdp.enable_cpu_offload)
    if settings.enable_compile and rank.device.type == "cuda":
        model.compile_layers()
    return model


def build_rollout_engine(config: Config, runtime: PolicyRuntime, folder: Path) -> RolloutEngine:
    """The engine of this rank, still without weights. `folder` takes its files, which it needs as long as it lives."""
    data, checkpoint = config.data, runtime.checkpoint
    save_engine_folder(folder, checkpoint, dtype=resolve_precision("auto", runtime.rank.device))
    return build_engine(
        folder,
        config=config.worker.rollout,
        max_model_len=data.max_prompt_length + data.max_response_length,
        forbidden_token_ids=forbidden_token_ids(checkpoint.processor, checkpoint.config.text_config.vocab_size),
        eos_token_id=checkpoint.processor.tokenizer.eos_token_id,
        device=runtime.rank.device,
    )


def save_actor(folder: Path, runtime: PolicyRuntime, *, dtype: torch.dtype) -> None:
    """Write `folder/huggingface/` and `folder/rm_head.pth` from rank 0; every rank takes part in the gathering."""
    weights = iterate_weights(runtime.actor, dtype=dtype)
    if runtime.rank.index == 0:
        head = runtime.actor.rm_head.weight
        save_policy(folder / "huggingface", weights=weights, head_weight=head, checkpoint=runtime.checkpoint)
        save_head(folder / HEAD_FILE, head)
    else:
        for _ in weights:
            pass
