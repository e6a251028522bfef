"""Validation: the policy thinks about held-out pairs, the rule judges the thoughts, the head ranks the videos."""

from verl.config import Config
from verl.trainer.cluster import WorkerGroup
from verl.trainer.generation import Generator, ScoredBatch
from verl.trainer.metrics import pair_metrics, response_metrics, reward_metrics
from verl.trainer.preflight import PairSet
from verl.trainer.tracking import Generation
from verl.types import ResponseKey

SCORE = "val/gsb_acc"


class Validator:
    """Validates on all pairs that load, `val_batch_size` at a time."""

    def __init__(self, config: Config, held_out: PairSet, generator: Generator, workers: WorkerGroup) -> None:
        self.config = config
        self.held_out = held_out
        self.generator = generator
        self.workers = workers

    def validate(self) -> tuple[dict[str, float], list[Generation]]:
        """Metrics under `val/`, and the generations of the first `val_generations_to_log` pairs."""
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
        return metrics, self._list_generations(scored, head_rewards)

    def _list_generations(self, scored: ScoredBatch, head_rewards: dict[ResponseKey, float]) -> list[Generation]:
        return [
            {
                **response.key._asdict(),
                **{f"reward/{name}": value for name, value in scored.rewards[response.key].items()},
                "prompt": rollout.pair.problem,
                "response": self.generator.decode(response),
                "head_reward": head_rewards[response.key],
                "answer": rollout.pair.answer,
            }
            for rollout in scored.rollouts[: self.config.trainer.val_generations_to_log]
            for response in rollout.responses
        ]

    def _score(self, batch: ScoredBatch) -> dict[ResponseKey, float]:
        """The head's reward of every response."""
        if not batch.rollouts:
            return {}
        copies = self.config.worker.actor.ulysses_size  # neighbouring ranks that share each row
        world_size = self.workers.world_size
        shares = [batch.rollouts[rank // copies :: world_size // copies] for rank in range(world_size)]
        results = self.workers.call_each("score", [(share, batch.rollouts[0]) for share in shares])
        return {key: reward for result in results for key, reward in result.items()}
