"""Validation: the policy thinks about held-out pairs, the rule judges the thoughts, the head ranks the videos."""

from verl.config import Config
from verl.trainer.cluster import WorkerGroup
from verl.trainer.generation import Generator, ScoredBatch
from verl.trainer.metrics import pair_metrics, response_metrics, reward_metrics
from verl.trainer.preflight import PairSet
from verl.trainer.tracking import GenerationSample
from verl.types import ResponseKey

SCORE = "val/gsb_acc"


class Validator:
    """Validates on all pairs that load, `val_batch_size` at a time."""

    def __init__(self, config: Config, held_out: PairSet, generator: Generator, workers: WorkerGroup) -> None:
        self.config = config
        self.held_out = held_out
        self.generator = generator
        self.workers = workers

    def validate(self) -> tuple[dict[str, float], list[GenerationSample]]:
        """Metrics under `val/`, and sample generations of the first pairs with what they were rewarded."""
        sampling = self.generator.validation_sampling()
        pairs, size = self.held_out.pairs, self.config.data.val_batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        scored = ScoredBatch()
        head_rewards: dict[ResponseKey, float] = {}
        for batch, upcoming in zip(batches, [*batches[1:], ()], strict=True):
            written = self.generator.generate(self.held_out, batch, sampling, upcoming=upcoming)
            head_rewards |= self._score(written)
            scored = scored.extend(written.without_prompts(), limit=len(pairs))
        responses = [response for rollout in scored.rollouts for response in rollout.responses]
        metrics = {
            **reward_metrics(scored.rewards, prefix="val/reward"),
            **response_metrics(responses, prefix="val/response_length"),
            **pair_metrics([rollout.pair for rollout in scored.rollouts], head_rewards),
        }
        samples = [
            GenerationSample(
                key=response.key,
                prompt=rollout.pair.problem,
                response=self.generator.decode(response),
                rewards=scored.rewards[response.key],
                head_reward=head_rewards[response.key],
                answer=rollout.pair.answer,
            )
            for rollout in scored.rollouts[: self.config.trainer.val_generations_to_log]
            for response in rollout.responses
        ]
        return metrics, samples

    def _score(self, batch: ScoredBatch) -> dict[ResponseKey, float]:
        """The head's reward of every response."""
        if not batch.rollouts:
            return {}
        copies = self.config.worker.actor.ulysses_size  # neighbouring ranks that share each row
        world_size = self.workers.world_size
        shares = [batch.rollouts[rank // copies :: world_size // copies] for rank in range(world_size)]
        results = self.workers.call_each("score", [(share, batch.rollouts[0]) for share in shares])
        return {key: reward for result in results for key, reward in result.items()}
