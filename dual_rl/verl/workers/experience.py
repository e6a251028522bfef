"""What is known before the update: vision features once per video, log-probs of the old policy and the reference."""

from collections.abc import Callable, Sequence

import torch

from verl.core.kl import compute_kl
from verl.core.packing import PackedGroups, split_labels
from verl.model.policy import PolicyModel, PolicyOutput, VisionFeatures
from verl.types import ResponseKey, VideoKey
from verl.workers.model_setup import PolicyRuntime
from verl.workers.parallel import max_over_ranks
from verl.workers.shard import MicroBatch, Shard, split_into_micro_batches


class ExperienceMaker:
    """Forward passes without gradient over a shard, `micro_batch_size` pairs at a time."""

    def __init__(self, runtime: PolicyRuntime, *, micro_batch_size: int, temperature: float) -> None:
        self.runtime = runtime
        self.micro_batch_size = micro_batch_size
        self.temperature = temperature

    def encode_vision(self, shard: Shard) -> None:
        """Run the frozen vision tower once over every video of the shard; the features serve all later passes."""
        for micro_batch in self._micro_batches(shard):
            shard.vision.update(self.encode_micro_batch(shard, micro_batch, self.runtime.actor))
        self.runtime.actor.reshard()

    @torch.no_grad()
    def encode_micro_batch(
        self, shard: Shard, micro_batch: MicroBatch, model: PolicyModel
    ) -> dict[VideoKey, VisionFeatures]:
        """Vision features of the micro-batch's videos, each as [tokens of the video, hidden]."""
        prompts = [shard.prompts[key] for key in micro_batch.videos]
        pixels = self.runtime.pixel_values(prompts)
        features = model.encode_videos(pixels, torch.tensor([prompt.grid_thw for prompt in prompts]))
        return dict(zip(micro_batch.videos, features.split(), strict=True))

    def old_log_probs(self, shard: Shard) -> dict[ResponseKey, torch.Tensor]:
        """Log-probs of the policy as it is now, float32 [num_labels] by response."""
        return self._log_probs(shard, self.runtime.actor)

    def ref_log_probs(self, shard: Shard) -> dict[ResponseKey, torch.Tensor]:
        """Log-probs of the reference: the adapter off, or the reference model."""
        with self.runtime.reference_policy() as reference:
            return self._log_probs(shard, reference)

    def rewards(self, shard: Shard) -> dict[ResponseKey, float]:
        """The head's reward of every response, at its `<Reward>`."""
        rewards: dict[ResponseKey, float] = {}

        def collect(packed: PackedGroups, output: PolicyOutput) -> None:
            rewards.update(zip(packed.keys, output.rewards.tolist(), strict=True))

        self._forward(shard, self.runtime.actor, collect, temperature=None)
        return rewards

    def _log_probs(self, shard: Shard, model: PolicyModel) -> dict[ResponseKey, torch.Tensor]:
        log_probs: dict[ResponseKey, torch.Tensor] = {}

        def collect(packed: PackedGroups, output: PolicyOutput) -> None:
            log_probs.update(split_labels(output.log_probs, packed))

        self._forward(shard, model, collect, temperature=self.temperature)
        return log_probs

    @torch.no_grad()
    def _forward(
        self,
        shard: Shard,
        model: PolicyModel,
        collect: Callable[[PackedGroups, PolicyOutput], None],
        *,
        temperature: float | None,
    ) -> None:
        """`temperature` None: rewards only."""
        was_training = model.training
        model.eval()
        for micro_batch in self._micro_batches(shard):
            vision = self.vision_of(shard, micro_batch, model)
            packed = shard.pack(micro_batch, self.runtime.builder, self.runtime.rank.device)
            output = model(packed, vision, temperature=temperature)
            if not micro_batch.is_filler:
                collect(packed, output)
        model.reshard()  # without a backward pass the root would stay whole, and its shards out of sight
        model.train(was_training)

    def vision_of(self, shard: Shard, micro_batch: MicroBatch, model: PolicyModel) -> VisionFeatures:
        """Features of the micro-batch in the row's order: cached ones, or computed now where the tower is tuned."""
        features = shard.vision or self.encode_micro_batch(shard, micro_batch, model)
        return VisionFeatures.concatenate([features[key] for key in micro_batch.videos])

    def _micro_batches(self, shard: Shard) -> Sequence[MicroBatch]:
        rollouts = shard.rollouts
        mine = -(-len(rollouts) // self.micro_batch_size)
        count = int(max_over_ranks(mine, device=self.runtime.rank.device))
        return list(split_into_micro_batches(rollouts, self.micro_batch_size, count=count))


def sum_kl_by_response(shard: Shard, *, kind: str) -> dict[ResponseKey, float]:
    """KL of the old policy to the reference, summed over each response's tokens: what KL in the reward takes off."""
    assert shard.old_log_probs is not None, "KL in the reward needs the old log-probs"
    assert shard.ref_log_probs is not None, "KL in the reward needs the reference's log-probs"
    return {
        key: float(compute_kl(old, shard.ref_log_probs[key], kind=kind).sum())
        for key, old in shard.old_log_probs.items()
    }
