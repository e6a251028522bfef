"""One rank's part of a step, and all that is computed before the update: vision features, old and reference log-probs.

Every rank runs the same number of forward passes, because FSDP's collectives must match. A rank with fewer pairs than
others, or with none, repeats a pair as a filler of weight zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from verl.core.objective import PolicyOutput
from verl.core.packing import PackedGroups, pack_groups, split_labels
from verl.data.scored_sequence import SequenceBuilder
from verl.model.policy import PolicyModel
from verl.types import SIDES, PairRollout, ResponseKey, VideoKey, VideoPrompt
from verl.workers.model_setup import PolicyRuntime
from verl.workers.parallel import max_over_ranks


@dataclass(frozen=True)
class MicroBatch:
    """The pairs of one forward pass. A filler only keeps the collectives in step."""

    rollouts: tuple[PairRollout, ...]
    is_filler: bool = False

    @property
    def videos(self) -> list[VideoKey]:
        """Every video of the pairs, in the order in which they are packed."""
        return [VideoKey(rollout.pair.pair_id, side) for rollout in self.rollouts for side in SIDES]


@dataclass
class RankBatch:
    """The pairs of this rank, by mini-batch, and what was computed for them.

    `filler`: any pair of the step, for a rank that has none. `prompts`: of all these pairs. `vision`: what
    `PolicyModel.encode_videos` returned, by video, empty if the tower is tuned. `old_log_probs`, `ref_log_probs`:
    float32 [num_labels] by response, None if the step does not need them.
    """

    mini_batches: Sequence[Sequence[PairRollout]]
    filler: PairRollout
    prompts: dict[VideoKey, VideoPrompt]
    vision: dict[VideoKey, torch.Tensor] = field(default_factory=dict)
    old_log_probs: dict[ResponseKey, torch.Tensor] | None = None
    ref_log_probs: dict[ResponseKey, torch.Tensor] | None = None

    @property
    def needed_rollouts(self) -> list[PairRollout]:
        """The pairs of all forward passes, at least one."""
        return [rollout for mini_batch in self.mini_batches for rollout in mini_batch] or [self.filler]

    def split(self, rollouts: Sequence[PairRollout], size: int, *, count: int) -> Iterator[MicroBatch]:
        """Exactly `count` micro-batches of at most `size` of the pairs, fillers last."""
        starts = range(0, len(rollouts), size)
        assert len(starts) <= count, f"{len(rollouts)} pairs do not fit into {count} micro-batches of {size}"
        for start in starts:
            yield MicroBatch(tuple(rollouts[start : start + size]))
        for _ in range(count - len(starts)):
            yield MicroBatch((rollouts[0] if rollouts else self.needed_rollouts[0],), is_filler=True)

    def pack(self, micro_batch: MicroBatch, builder: SequenceBuilder, device: torch.device) -> PackedGroups:
        """The micro-batch as one packed row on `device`: each prompt once, then its responses."""
        responses = [side for rollout in micro_batch.rollouts for side in (rollout.responses_a, rollout.responses_b)]
        prompts = [self.prompts[key] for key in micro_batch.videos]
        return pack_groups(list(zip(prompts, responses, strict=True)), builder).to(device)


class ExperienceMaker:
    """Forward passes without gradient over a rank's pairs, `micro_batch_size` at a time."""

    def __init__(self, runtime: PolicyRuntime, *, micro_batch_size: int, temperature: float) -> None:
        self.runtime = runtime
        self.micro_batch_size = micro_batch_size
        self.temperature = temperature

    def encode_vision(self, batch: RankBatch) -> None:
        """Run the frozen vision tower once per video of the batch; all later passes use its features."""
        for micro_batch in self._micro_batches(batch):
            batch.vision.update(self._encode(batch, micro_batch, self.runtime.actor))
        self.runtime.actor.reshard()

    def old_log_probs(self, batch: RankBatch) -> dict[ResponseKey, torch.Tensor]:
        """Log-probs of the policy as it is now, float32 [num_labels] by response."""
        return self._log_probs(batch, self.runtime.actor)

    def ref_log_probs(self, batch: RankBatch) -> dict[ResponseKey, torch.Tensor]:
        """Log-probs of the reference: the actor without its adapter, or the reference model."""
        with self.runtime.reference_policy() as reference:
            return self._log_probs(batch, reference)

    def rewards(self, batch: RankBatch) -> dict[ResponseKey, float]:
        """The head's reward of every response, at its `<Reward>`."""
        rewards: dict[ResponseKey, float] = {}
        for packed, output in self._forward(batch, self.runtime.actor, temperature=None):
            rewards |= zip(packed.keys, output.rewards.tolist(), strict=True)
        return rewards

    def vision_of(self, batch: RankBatch, micro_batch: MicroBatch, model: PolicyModel) -> torch.Tensor:
        """Features of the micro-batch in the row's order: cached, or computed now if the tower is tuned."""
        features = batch.vision or self._encode(batch, micro_batch, model)
        return torch.cat([features[key] for key in micro_batch.videos], dim=1)

    @torch.no_grad()
    def _encode(self, batch: RankBatch, micro_batch: MicroBatch, model: PolicyModel) -> dict[VideoKey, torch.Tensor]:
        """Vision features of each of the micro-batch's videos."""
        prompts = [batch.prompts[key] for key in micro_batch.videos]
        grids = torch.tensor([prompt.grid_thw for prompt in prompts])
        features = model.encode_videos(self.runtime.pixel_values(prompts), grids)
        num_tokens = (grids.prod(dim=1) // self.runtime.builder.merge_size**2).tolist()
        pieces = features.split(num_tokens, dim=1)
        return {  # copies: a view would keep the others' memory
            key: piece.clone() for key, piece in zip(micro_batch.videos, pieces, strict=True)
        }

    def _log_probs(self, batch: RankBatch, model: PolicyModel) -> dict[ResponseKey, torch.Tensor]:
        log_probs: dict[ResponseKey, torch.Tensor] = {}
        for packed, output in self._forward(batch, model, temperature=self.temperature):
            log_probs |= split_labels(output.log_probs, packed)
        return log_probs

    @torch.no_grad()
    def _forward(
        self, batch: RankBatch, model: PolicyModel, *, temperature: float | None
    ) -> list[tuple[PackedGroups, PolicyOutput]]:
        """Every packed row with its output; `temperature` None gives rewards only."""
        was_training = model.training
        model.eval()
        passes = []
        for micro_batch in self._micro_batches(batch):
            packed = batch.pack(micro_batch, self.runtime.builder, self.runtime.rank.device)
            output = model(packed, self.vision_of(batch, micro_batch, model), temperature=temperature)
            if not micro_batch.is_filler:
                passes.append((packed, output))
        model.reshard()  # without a backward pass the root would stay whole
        model.train(was_training)
        return passes

    def _micro_batches(self, batch: RankBatch) -> Iterator[MicroBatch]:
        mine = -(-len(batch.needed_rollouts) // self.micro_batch_size)
        count = int(max_over_ranks(mine, device=self.runtime.rank.device))
        return batch.split(batch.needed_rollouts, self.micro_batch_size, count=count)
