"""One rank's part of a step: its pairs with prompts, cached vision features and log-probs, and their micro-batches.

Every rank runs the same number of forward passes, because FSDP's collectives must match. A rank with fewer pairs than
others, or with none, repeats a pair as a filler of weight zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from verl.core.packing import PackedGroups, pack_groups
from verl.data.scored_sequence import SequenceBuilder
from verl.model.policy import VisionFeatures
from verl.types import SIDES, PairRollout, ResponseKey, VideoKey, VideoPrompt


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

    `filler`: any pair of the step, for a rank that has none. `prompts`: of all these pairs. `vision`: features by
    video, empty if the tower is tuned. `old_log_probs`, `ref_log_probs`: float32 [num_labels] by response, None if the
    step does not need them.
    """

    mini_batches: Sequence[Sequence[PairRollout]]
    filler: PairRollout
    prompts: dict[VideoKey, VideoPrompt]
    vision: dict[VideoKey, VisionFeatures] = field(default_factory=dict)
    old_log_probs: dict[ResponseKey, torch.Tensor] | None = None
    ref_log_probs: dict[ResponseKey, torch.Tensor] | None = None

    @property
    def rollouts(self) -> list[PairRollout]:
        return [rollout for mini_batch in self.mini_batches for rollout in mini_batch]

    @property
    def needed_rollouts(self) -> list[PairRollout]:
        """The pairs of all forward passes, at least one."""
        return self.rollouts or [self.filler]

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
