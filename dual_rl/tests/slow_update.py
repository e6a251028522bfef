"""The update written out plainly: separate full sequences, two forwards each, and every formula by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model_support import make_builder, small_checkpoint
from slow_path import compute_log_distributions, compute_reward, load_policy
from update_support import TEMPERATURE, Case, Tensors, make_advantages, make_batch, make_config, shift_weights, trained
from verl.model.policy import PolicyModel
from verl.types import PairRollout, Response, ResponseKey


class SlowUpdate:
    """The update on one process without packing, sharding, caching or micro-batches."""

    def __init__(self, model: Path, case: Case) -> None:
        self.config = make_config(model, case.settings)
        checkpoint = small_checkpoint(model)
        self.builder = make_builder(checkpoint)
        self.model = load_policy(checkpoint, self.config.worker.actor.model)
        shift_weights(self.model)
        self.reference = load_policy(checkpoint, make_config(model, {}).worker.actor.model)
        self.rollouts, self.prompts = make_batch(case, self.builder)
        self.advantages = make_advantages(case)

    def distributions(self, model: PolicyModel, response: Response) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-distributions, [num_labels, vocab], and the log-probs of what was drawn."""
        prompt = self.prompts[response.key.video]
        found = compute_log_distributions(model, prompt, response, self.builder, temperature=TEMPERATURE)
        labels = torch.tensor([*response.cot_ids, self.builder.tokenizer.eos_token_id])[: response.num_labels]
        return found, found.gather(1, labels.long().unsqueeze(1)).squeeze(1)

    def gradient(
        self, rollouts: Sequence[PairRollout], old: Mapping[ResponseKey, torch.Tensor] | None = None
    ) -> tuple[float, Tensors]:
        """Loss and gradient of a mini-batch."""
        actor, algorithm = self.config.worker.actor, self.config.algorithm
        responses = [response for rollout in rollouts for response in rollout.responses if response.num_labels]
        num_tokens = sum(response.num_labels for response in responses)
        loss = torch.zeros(())
        for response in responses:
            distribution, log_probs = self.distributions(self.model, response)
            before = log_probs.detach() if old is None else old[response.key]
            ratio, advantage = (log_probs - before).exp(), self.advantages[response.key]
            clipped = ratio.clamp(1 - actor.clip_ratio_low, 1 + actor.clip_ratio_high)
            losses = torch.maximum(-ratio * advantage, -clipped * advantage)
            if advantage < 0:
                losses = losses.clamp(max=-actor.clip_ratio_dual * advantage)
            if actor.importance_sampling_cap is not None:
                losses = losses * (before - response.log_probs).exp().clamp(max=actor.importance_sampling_cap)
            if not algorithm.disable_kl:
                losses = losses + algorithm.kl_coef * self._kl(response, distribution, log_probs)
            weight = num_tokens if actor.loss_avg_mode == "token" else len(responses) * response.num_labels
            loss = loss + losses.sum() / weight
        loss = loss + actor.bt_weight * self.pair_loss(rollouts)
        parameters = trained(self.model)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        return loss.item(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    def _kl(self, response: Response, distribution: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            ref_distribution, ref_log_probs = self.distributions(self.reference, response)
        if self.config.algorithm.kl_penalty == "low_var_kl":
            gap = log_probs - ref_log_probs
            return (-gap).exp() + gap - 1
        gaps = torch.where(distribution.isinf(), 0.0, distribution - ref_distribution)
        return (distribution.exp() * gaps).sum(dim=1)

    def pair_loss(self, rollouts: Sequence[PairRollout]) -> torch.Tensor:
        """Mean over (A_i, B_i) of -log(1 / (1 + exp(worse - better)))."""
        losses = []
        for rollout in rollouts:
            if rollout.pair.preference in (1, -1):
                for both in zip(rollout.responses_a, rollout.responses_b, strict=True):
                    a, b = (compute_reward(self.model, self.prompts[r.key.video], r, self.builder) for r in both)
                    losses.append((1 + (rollout.pair.preference * (b - a)).exp()).log())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def run(self) -> list[Tensors]:
        """Clipped gradients of every optimizer step: `ppo_epochs` times all mini-batches, with AdamW in between."""
        actor, parameters = self.config.worker.actor, trained(self.model)
        optim = actor.optim
        groups = [
            {"params": [p for p in parameters.values() if (p.ndim > 1) == is_decayed], "weight_decay": decay}
            for is_decayed, decay in ((True, optim.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        with torch.no_grad():
            responses = [response for rollout in self.rollouts for response in rollout.responses]
            old = {response.key: self.distributions(self.model, response)[1] for response in responses}
        starts = range(0, len(self.rollouts), actor.global_batch_size)
        gradients = []
        for start in [*starts] * actor.ppo_epochs:
            _, found = self.gradient(self.rollouts[start : start + actor.global_batch_size], old)
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            torch.nn.utils.clip_grad_norm_(parameters.values(), actor.max_grad_norm)
            gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
            optimizer.step()
        return gradients
