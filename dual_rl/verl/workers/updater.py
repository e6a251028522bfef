"""The update: one packed forward gives log-probs and rewards; policy loss, KL and Bradley-Terry share one backward.

Each loss is a sum that is divided by a count over all ranks and micro-batches (response tokens or responses; valid
pairs), so the gradient depends on neither. FSDP averages gradients over ranks, hence the factor world_size. Where
several ranks share each row, all of them hold its whole loss, hence the division by their number (`copies`).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from verl.core.kl import compute_kl
from verl.core.packing import PackedGroups, join_labels
from verl.core.pair_loss import compute_pair_loss, encode_preferences, index_pairs
from verl.core.policy_loss import compute_importance_weights, compute_policy_loss, compute_token_weights
from verl.core.token_log_probs import Distributions
from verl.model.policy import PolicyOutput
from verl.trainer.config import Config
from verl.types import PairRollout, ResponseKey
from verl.workers.experience import ExperienceMaker
from verl.workers.model_setup import PolicyRuntime
from verl.workers.offload import MomentOffload
from verl.workers.optimizer import set_learning_rates
from verl.workers.parallel import (
    average_replicated_gradients,
    clip_gradients,
    max_over_ranks,
    sum_over_ranks,
)
from verl.workers.shard import MicroBatch, Shard, split_into_micro_batches


@dataclass(frozen=True)
class GlobalCounts:
    """Of one mini-batch over all ranks: labels, responses with a label, and (A_i, B_i) with a preference."""

    tokens: int
    responses: int
    pairs: int
    micro_batches: int


class Updater:
    """Optimizer steps over a shard."""

    def __init__(self, runtime: PolicyRuntime, experience: ExperienceMaker, config: Config) -> None:
        self.runtime = runtime
        self.experience = experience
        self.actor_config = config.worker.actor
        self.algorithm = config.algorithm
        self.rollout = config.worker.rollout
        self.moments = MomentOffload(runtime.optimizer)

    def update(
        self, shard: Shard, advantages: Mapping[ResponseKey, float], *, step: int, lr_factor: float
    ) -> dict[str, float]:
        """All optimizer steps of one rollout batch; returns metrics, the same on every rank."""
        actor = self.runtime.actor
        actor.train()
        if self.runtime.activations is not None:
            self.runtime.activations.start()
        learning_rate = set_learning_rates(self.runtime.optimizer, lr_factor)
        collected: dict[str, list[float]] = defaultdict(list)
        for epoch in range(self.actor_config.ppo_epochs):
            for mini_batch in shard.mini_batches:
                metrics = self._optimizer_step(shard, mini_batch, advantages, step=step)
                for name, value in metrics.items():
                    if epoch == 0 or not name.startswith("rollout/"):
                        collected[name].append(value)
        means = {
            name: max(values) if name.endswith("_max") else sum(values) / len(values)
            for name, values in collected.items()
        }
        return {**means, "actor/lr": learning_rate, "actor/head_norm": actor.rm_head.weight.detach().norm().item()}

    def _optimizer_step(
        self,
        shard: Shard,
        mini_batch: tuple[PairRollout, ...],
        advantages: Mapping[ResponseKey, float],
        *,
        step: int,
    ) -> dict[str, float]:
        counts = self._count(mini_batch)
        size = self.actor_config.micro_batch_size_per_device_for_update
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.runtime.rank.device))
        largest_difference = torch.zeros((), device=self.runtime.rank.device)
        copies = self.runtime.copies
        for micro_batch in split_into_micro_batches(mini_batch, size, count=counts.micro_batches):
            loss, metrics, difference = self._micro_batch_loss(shard, micro_batch, advantages, counts)
            (loss * (self.runtime.rank.world_size / copies)).backward()
            largest_difference = torch.maximum(largest_difference, difference)
            for name, value in metrics.items():
                sums[name] += value.detach()
        names = sorted(sums)
        totals = sum_over_ranks(torch.stack([sums[name].float() for name in names]) / copies).tolist()
        metrics = dict(zip(names, totals, strict=True))
        metrics["actor/grad_norm"], metrics["actor/head_grad_norm"] = self._step_optimizer(metrics, step=step)
        metrics["rollout/log_prob_difference_max"] = max_over_ranks(
            largest_difference.item(), device=self.runtime.rank.device
        )
        return metrics

    def _count(self, mini_batch: tuple[PairRollout, ...]) -> GlobalCounts:
        responses = [response for rollout in mini_batch for response in rollout.responses]
        decided = [rollout for rollout in mini_batch if rollout.pair.preference]
        device = self.runtime.rank.device
        local = torch.tensor(
            [
                sum(response.num_labels for response in responses),
                sum(response.num_labels > 0 for response in responses),
                sum(len(rollout.responses_a) for rollout in decided),
            ],
            dtype=torch.float64,
            device=device,
        )
        copies = self.runtime.copies
        tokens, num_responses, pairs = (int(value) // copies for value in sum_over_ranks(local).tolist())
        mine = math.ceil(len(mini_batch) / self.actor_config.micro_batch_size_per_device_for_update)
        return GlobalCounts(tokens, num_responses, pairs, int(max_over_ranks(mine, device=device)))

    def _micro_batch_loss(
        self,
        shard: Shard,
        micro_batch: MicroBatch,
        advantages: Mapping[ResponseKey, float],
        counts: GlobalCounts,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """This micro-batch's share of the mini-batch's loss, its shares of the metrics, the largest log-prob gap.

        Nothing is read back from the device, so that the backward pass follows without a pause.
        """
        packed = shard.pack(micro_batch, self.runtime.builder, self.runtime.rank.device)
        output, token_kl = self._forward(shard, micro_batch, packed)
        owner = packed.label_owner
        share = 0.0 if micro_batch.is_filler else 1.0
        weights = share * compute_token_weights(
            owner, mode=self.actor_config.loss_avg_mode, num_tokens=counts.tokens, num_responses=counts.responses
        )
        rollout = torch.cat([response.log_probs for response in micro_batch.responses]).to(owner.device)
        is_on_policy = shard.old_log_probs is None
        old = output.log_probs.detach() if is_on_policy else join_labels(shard.old_log_probs, packed)
        cap = self.actor_config.importance_sampling_cap
        importance = 1.0 if cap is None else compute_importance_weights(old, rollout, cap=cap)
        by_response = torch.tensor([advantages[key] for key in packed.keys], device=owner.device)
        policy = compute_policy_loss(
            output.log_probs,
            old_log_probs=old,
            advantages=by_response[owner],
            owner=owner,
            weights=weights * importance,
            settings=self.actor_config,
        )
        loss, metrics = policy.loss, {"actor/policy_loss": policy.loss}
        for name in ("ratio", "approx_kl", "clip_high", "clip_low", "clip_dual"):
            metrics[f"actor/{name}"] = share * policy.sums[name] / counts.tokens
        metrics["actor/entropy"] = (weights * output.entropy).sum()
        if token_kl is not None:
            metrics["actor/kl"] = (weights * token_kl).sum()
            loss = loss + self.algorithm.kl_coef * metrics["actor/kl"]
        loss = loss + self._pair_loss(micro_batch, packed, output, counts, metrics)
        metrics["actor/loss"] = loss
        difference = share * (old - rollout).abs()
        metrics["rollout/log_prob_difference_mean"] = difference.sum() / counts.tokens
        metrics["rollout/log_prob_beyond_bound"] = (difference > self.rollout.log_prob_bound).sum() / counts.tokens
        return loss, metrics, difference.max() if difference.numel() else difference.new_zeros(())

    def _forward(
        self, shard: Shard, micro_batch: MicroBatch, packed: PackedGroups
    ) -> tuple[PolicyOutput, torch.Tensor | None]:
        """The policy's output, and its KL to the reference per token where that is part of the loss."""
        kl_kind = self.algorithm.kl_penalty if self.algorithm.use_kl_loss and not self.algorithm.disable_kl else None
        temperature = self.experience.temperature
        states = self._reference_states(shard, micro_batch, packed) if kl_kind == "full" else None
        actor = self.runtime.actor
        if shard.vision:
            inputs = {"vision": self.experience.vision_of(shard, micro_batch, actor)}
        else:  # a tuned tower takes part in the gradient
            prompts = [shard.prompts[key] for key in micro_batch.videos]
            inputs = {"vision": None, "pixel_values": self.runtime.pixel_values(prompts)}
        if self.runtime.activations is not None:
            self.runtime.activations.prepare(packed.num_tokens)
        output = actor(packed, **inputs, temperature=temperature, ref_distributions=states)
        if kl_kind is None:
            return output, None
        if kl_kind == "full":
            return output, output.full_kl
        ref_log_probs = join_labels(shard.ref_log_probs, packed)
        return output, compute_kl(output.log_probs, ref_log_probs, kind=kl_kind)

    @torch.no_grad()
    def _reference_states(self, shard: Shard, micro_batch: MicroBatch, packed: PackedGroups) -> Distributions:
        """What the full KL needs of the reference."""
        with self.runtime.reference_policy() as reference:
            vision = self.experience.vision_of(shard, micro_batch, reference)
            output = reference(packed, vision, temperature=self.experience.temperature, return_distributions=True)
            reference.reshard()
        return output.distributions

    def _pair_loss(
        self,
        micro_batch: MicroBatch,
        packed: PackedGroups,
        output: PolicyOutput,
        counts: GlobalCounts,
        metrics: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """bt_weight times the share of the Bradley-Terry loss over (A_i, B_i); adds its metrics to `metrics`."""
        index = index_pairs(packed.keys)
        preference = {rollout.pair.pair_id: rollout.pair.preference for rollout in micro_batch.rollouts}
        labels = [None if micro_batch.is_filler else preference[pair_id] for pair_id in index.pair_ids]
        pairs = compute_pair_loss(
            output.rewards[index.a.to(output.rewards.device)],
            output.rewards[index.b.to(output.rewards.device)],
            preferences=encode_preferences(labels).to(output.rewards.device),
        )
        count = max(counts.pairs, 1)
        metrics["bt/loss"] = pairs.loss / count
        metrics["bt/accuracy"] = pairs.sums["num_correct"] / count
        metrics["bt/chosen_reward"] = pairs.sums["chosen_reward"] / count
        metrics["bt/rejected_reward"] = pairs.sums["rejected_reward"] / count
        return self.actor_config.bt_weight * pairs.loss / count

    def _step_optimizer(self, metrics: Mapping[str, float], *, step: int) -> tuple[float, float]:
        """Average, check, clip, step. Raises ValueError on every rank when anything is not finite."""
        actor, optimizer = self.runtime.actor, self.runtime.optimizer
        average_replicated_gradients(actor.replicated_parameters(), world_size=self.runtime.rank.world_size)
        parameters = [parameter for parameter in actor.parameters() if parameter.requires_grad]
        norm, head_norm = clip_gradients(parameters, self.actor_config.max_grad_norm)
        if not (math.isfinite(norm) and math.isfinite(metrics["actor/loss"])):
            raise ValueError(
                f"step {step}: loss {metrics['actor/loss']} with gradient norm {norm}: stopped before the weights "
                "were changed. Lower worker.actor.optim.lr, or look at the responses of the last logged step"
            )
        is_offloaded = self.actor_config.offload.offload_optimizer
        if is_offloaded:  # only now, when no activation is alive
            self.moments.restore(self.runtime.rank.device)
        optimizer.step()
        if is_offloaded:
            self.moments.release()
        optimizer.zero_grad(set_to_none=True)
        return norm, head_norm
