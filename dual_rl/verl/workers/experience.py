"""Everything that is fixed before the update: vision features, log-probs of the old policy and of the reference."""

from collections.abc import Iterator

import torch

from verl.core.objective import PolicyOutput
from verl.core.packing import PackedGroups, split_labels
from verl.model.policy import PolicyModel, VisionFeatures
from verl.types import ResponseKey, VideoKey
from verl.workers.model_setup import PolicyRuntime
from verl.workers.parallel import max_over_ranks
from verl.workers.rank_batch import MicroBatch, RankBatch


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
        passes = self._forward(batch, self.runtime.actor, temperature=None)
        return {
            key: reward
            for packed, output in passes
            for key, reward in zip(packed.keys, output.rewards.tolist(), strict=True)
        }

    def vision_of(self, batch: RankBatch, micro_batch: MicroBatch, model: PolicyModel) -> VisionFeatures:
        """Features of the micro-batch in the row's order: cached, or computed now if the tower is tuned."""
        features = batch.vision or self._encode(batch, micro_batch, model)
        return VisionFeatures.concatenate([features[key] for key in micro_batch.videos])

    @torch.no_grad()
    def _encode(self, batch: RankBatch, micro_batch: MicroBatch, model: PolicyModel) -> dict[VideoKey, VisionFeatures]:
        """Vision features of the micro-batch's videos, each as [tokens of the video, hidden]."""
        prompts = [batch.prompts[key] for key in micro_batch.videos]
        grids = torch.tensor([prompt.grid_thw for prompt in prompts])
        features = model.encode_videos(self.runtime.pixel_values(prompts), grids)
        return dict(zip(micro_batch.videos, features.split(), strict=True))

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
