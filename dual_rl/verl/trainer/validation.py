"""Validation: the policy thinks about held-out pairs, the rule judges the thoughts, the head ranks the videos."""

from collections.abc import Sequence

from verl.trainer.cluster import WorkerGroup
from verl.trainer.config import Config
from verl.trainer.generation import Generator, ScoredBatch
from verl.trainer.metrics import pair_metrics, response_metrics, reward_metrics
from verl.trainer.tracking import GenerationSample
from verl.types import PairRollout, PreferencePair, ResponseKey

SCORE = "val/gsb_acc"


class Validator:
    """Validates on all pairs, `val_batch_size` at a time; drops none."""

    def __init__(
        self, config: Config, pairs: Sequence[PreferencePair], generator: Generator, workers: WorkerGroup
    ) -> None:
        self.config = config
        self.pairs = tuple(pairs)
        self.generator = generator
        self.workers = workers

    def validate(self) -> tuple[dict[str, float], list[GenerationSample]]:
        """Metrics under `val/`, and sample generations of the first pairs with what they were rewarded."""
        sampling = self.generator.validation_sampling()
        size = self.config.data.val_batch_size
        batches = [self.pairs[start : start + size] for start in range(0, len(self.pairs), size)]
        rollouts: list[PairRollout] = []
        rewards: dict[ResponseKey, dict[str, float]] = {}
        head_rewards: dict[ResponseKey, float] = {}
        for batch, upcoming in zip(batches, [*batches[1:], ()], strict=True):
            scored = self.generator.generate(batch, sampling, upcoming=upcoming)
            head_rewards |= self._score(scored)
            rollouts += scored.rollouts
            rewards |= scored.rewards
            self.generator.forget()
        responses = [response for rollout in rollouts for response in rollout.responses]
        metrics = {
            **reward_metrics(rewards, prefix="val/reward"),
            **response_metrics(responses, prefix="val/response_length"),
            **pair_metrics(self.pairs, head_rewards),
        }
        return metrics, self._sample(rollouts, rewards, head_rewards)

    def _score(self, batch: ScoredBatch) -> dict[ResponseKey, float]:
        """The head's reward of every response. A rank without a pair of its own repeats one, to take part."""
        handles, world_size = self.generator.handles, self.workers.world_size
        copies = self.config.worker.actor.ulysses_size  # neighbouring ranks that share each row
        arguments = []
        for rank in range(world_size):
            mine = batch.rollouts[rank // copies :: world_size // copies] or batch.rollouts[:1]
            arguments.append((mine, {rollout.pair.pair_id: handles[rollout.pair.pair_id] for rollout in mine}))
        results: list[dict[ResponseKey, float]] = self.workers.call_each("score", arguments)
        return {key: reward for result in results for key, reward in result.items()}

    def _sample(
        self,
        rollouts: Sequence[PairRollout],
        rewards: dict[ResponseKey, dict[str, float]],
        head_rewards: dict[ResponseKey, float],
    ) -> list[GenerationSample]:
        samples = []
        for rollout in rollouts[: self.config.trainer.val_generations_to_log]:
            for response in rollout.responses:
                samples.append(
                    GenerationSample(
                        key=response.key,
                        prompt=rollout.pair.problem,
                        response=self.generator.decode(response),
                        rewards=rewards[response.key],
                        head_reward=head_rewards[response.key],
                        answer=rollout.pair.answer,
                    )
                )
        return samples
