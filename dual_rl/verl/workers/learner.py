"""The update: one packed forward gives log-probs and rewards; policy loss, KL and Bradley-Terry share one backward.

The objective is in `core/objective.py`. Its terms are divided by counts over all ranks and micro-batches, so that the
gradient depends on neither. FSDP averages gradients over ranks, hence the factor world_size. Ranks that share a row
all hold its whole loss, hence the division by their number (`copies`).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from verl.config import Config
from verl.core.objective import Experience, GlobalCounts, PolicyOutput, dual_loss
from verl.core.packing import PackedGroups
from verl.types import PairRollout, ResponseKey
from verl.workers.experience import ExperienceMaker, MicroBatch, RankBatch
from verl.workers.model_setup import PolicyRuntime
from verl.workers.offload import MomentOffload
from verl.workers.parallel import average_replicated_gradients, clip_gradients, max_over_ranks, sum_over_ranks

MAXIMUM_SUFFIX = "_max"  # of metrics that are reduced by their maximum, not by sum or mean


class Learner:
    """Optimizer steps on a rank's pairs; all ranks call it together."""

    def __init__(self, runtime: PolicyRuntime, experience: ExperienceMaker, config: Config) -> None:
        self.runtime = runtime
        self.experience = experience
        self.config = config
        self.moments = MomentOffload(runtime.optimizer)

    def learn(
        self, batch: RankBatch, advantages: Mapping[ResponseKey, float], *, step: int, lr_factor: float
    ) -> dict[str, float]:
        """All optimizer steps of one rollout batch; returns metrics, the same on every rank."""
        actor, settings = self.runtime.actor, self.config.worker.actor
        size = settings.micro_batch_size_per_device_for_update
        known = Experience(
            advantages=advantages,
            preferences={rollout.pair.pair_id: rollout.pair.preference for rollout in batch.needed_rollouts},
            rollout_log_probs={r.key: r.log_probs for rollout in batch.needed_rollouts for r in rollout.responses},
            old_log_probs=batch.old_log_probs,
            ref_log_probs=batch.ref_log_probs,
        )
        actor.train()
        if self.runtime.activations is not None:
            self.runtime.activations.start()
        for group in self.runtime.optimizer.param_groups:
            group["lr"] = lr_factor * group["base_lr"]
        history: dict[str, list[float]] = defaultdict(list)
        for epoch in range(settings.ppo_epochs):
            for mini_batch in batch.mini_batches:
                counts, num_micro_batches = self._count(mini_batch)
                sums: dict[str, torch.Tensor] = {}
                for micro_batch in batch.split(mini_batch, size, count=num_micro_batches):
                    packed = batch.pack(micro_batch, self.runtime.builder, self.runtime.rank.device)
                    output = self._forward(batch, micro_batch, packed)
                    loss, metrics = dual_loss(output, packed, known, counts, self.config)
                    weight = 0.0 if micro_batch.is_filler else 1.0
                    (loss * (weight * self.runtime.rank.world_size / self.runtime.copies)).backward()
                    _accumulate(sums, metrics, weight)
                totals = self._reduce(sums)
                if epoch == 0:
                    self._check_rollout(totals["rollout/log_prob_difference_mean"], step=step)
                totals |= self._step_optimizer(totals["actor/loss"], step=step)
                for name, value in totals.items():
                    if epoch == 0 or not name.startswith("rollout/"):
                        history[name].append(value)
        return {
            **{name: max(v) if name.endswith(MAXIMUM_SUFFIX) else sum(v) / len(v) for name, v in history.items()},
            "actor/lr": self.runtime.optimizer.param_groups[0]["lr"],
            "actor/head_norm": actor.rm_head.weight.detach().norm().item(),
        }

    def _count(self, mini_batch: Sequence[PairRollout]) -> tuple[GlobalCounts, int]:
        """Counts over all ranks, and the number of micro-batches that every rank runs."""
        responses = [response for rollout in mini_batch for response in rollout.responses]
        mine = (
            sum(response.num_labels for response in responses),
            sum(response.num_labels > 0 for response in responses),
            sum(len(rollout.responses_a) for rollout in mini_batch if rollout.pair.preference),
        )
        device = self.runtime.rank.device
        totals = sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=device))
        counts = GlobalCounts(*(int(total) // self.runtime.copies for total in totals))
        size = self.config.worker.actor.micro_batch_size_per_device_for_update
        return counts, int(max_over_ranks(math.ceil(len(mini_batch) / size), device=device))

    def _forward(self, batch: RankBatch, micro_batch: MicroBatch, packed: PackedGroups) -> PolicyOutput:
        """The policy's output, with the full KL to the reference if it is part of the loss."""
        algorithm, temperature = self.config.algorithm, self.experience.temperature
        distributions = None
        if algorithm.has_kl_loss and algorithm.kl_penalty == "full":
            with torch.no_grad(), self.runtime.reference_policy() as reference:
                vision = self.experience.vision_of(batch, micro_batch, reference)
                output = reference(packed, vision, temperature=temperature, return_distributions=True)
                reference.reshard()
            distributions = output.distributions
        if batch.vision:
            inputs = {"vision": self.experience.vision_of(batch, micro_batch, self.runtime.actor)}
        else:  # a tuned tower takes part in the gradient
            prompts = [batch.prompts[key] for key in micro_batch.videos]
            inputs = {"pixel_values": self.runtime.pixel_values(prompts)}
        if self.runtime.activations is not None:
            self.runtime.activations.prepare(packed.num_tokens)
        return self.runtime.actor(packed, **inputs, temperature=temperature, ref_distributions=distributions)

    def _reduce(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Metrics over all ranks."""
        added = sorted(name for name in sums if not name.endswith(MAXIMUM_SUFFIX))
        totals = sum_over_ranks(torch.stack([sums[name].float() for name in added]) / self.runtime.copies)
        largest = {
            name: max_over_ranks(value.item(), device=self.runtime.rank.device)
            for name, value in sums.items()
            if name.endswith(MAXIMUM_SUFFIX)
        }
        return dict(zip(added, totals, strict=True)) | largest

    def _check_rollout(self, difference: float, *, step: int) -> None:
        """Raise ValueError on every rank when the responses were drawn from another distribution than the policy's.

        Not where top_p or top_k cut that distribution, as the engine's log-probs are those of what is left.
        """
        rollout = self.config.worker.rollout
        if rollout.top_p < 1.0 or rollout.top_k != -1 or difference <= rollout.max_log_prob_difference:
            return
        remedy = "Leave out worker.rollout.quantization and kv_cache_dtype, or raise the limit."
        if not rollout.is_quantized:
            remedy = "Check the versions of vllm and transformers against requirements.txt, or raise the limit."
        raise ValueError(
            f"step {step}: log-probs of rollout and trainer differ by {difference:.3f} on average, more than "
            f"worker.rollout.max_log_prob_difference={rollout.max_log_prob_difference}. The run stopped before these "
            f"responses changed the weights. {remedy}"
        )

    def _step_optimizer(self, loss: float, *, step: int) -> dict[str, float]:
        """Average, check, clip, step. Raises ValueError on every rank when anything is not finite."""
        actor, optimizer, settings = self.runtime.actor, self.runtime.optimizer, self.config.worker.actor
        average_replicated_gradients(actor.replicated_parameters(), world_size=self.runtime.rank.world_size)
        parameters = [parameter for parameter in actor.parameters() if parameter.requires_grad]
        norm, head_norm = clip_gradients(parameters, settings.max_grad_norm)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise ValueError(
                f"step {step}: loss {loss} with gradient norm {norm}. The run stopped before the weights changed. "
                "Lower worker.actor.optim.lr, or look at the responses of the last logged step."
            )
        if settings.offload.offload_optimizer:  # only now, when no activation is alive
            self.moments.restore(self.runtime.rank.device)
        optimizer.step()
        if settings.offload.offload_optimizer:
            self.moments.release()
        optimizer.zero_grad(set_to_none=True)
        return {"actor/grad_norm": norm, "actor/head_grad_norm": head_norm}


def _accumulate(sums: dict[str, torch.Tensor], metrics: Mapping[str, torch.Tensor], weight: float) -> None:
    for name, value in metrics.items():
        before = sums.get(name, torch.zeros_like(value))
        share = weight * value
        sums[name] = torch.maximum(before, share) if name.endswith(MAXIMUM_SUFFIX) else before + share
