"""Validation: the policy thinks about held-out pairs, the rule judges the thoughts, the head ranks the videos."""

from verl.config import Config
from verl.data.loading import PairLoader
from verl.trainer.cluster import WorkerGroup
from verl.trainer.generation import Generator, ScoredBatch
from verl.trainer.metrics import pair_metrics, response_metrics, reward_metrics
from verl.trainer.tracking import Generation
from verl.types import ResponseKey

SCORE = "val/gsb_acc"


def run_validation(
    config: Config, held_out: PairLoader, generator: Generator, workers: WorkerGroup
) -> tuple[dict[str, float], list[Generation]]:
    """Metrics under `val/` on all pairs that load, and the generations of the first `val_generations_to_log` pairs."""
    sampling = generator.validation_sampling()
    pairs, size = held_out.pairs, config.data.val_batch_size
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    scored = ScoredBatch()
    head_rewards: dict[ResponseKey, float] = {}
    for batch, upcoming in zip(batches, [*batches[1:], ()], strict=True):
        written = generator.generate(held_out, batch, sampling, upcoming=upcoming)
        head_rewards |= _score(written, workers, copies=config.worker.actor.ulysses_size)
        scored = scored.extend(written.without_prompts(), limit=len(pairs))
    responses = [response for rollout in scored.rollouts for response in rollout.responses]
    metrics = {
        **reward_metrics(scored.rewards, prefix="val/reward"),
        **response_metrics(responses, prefix="val/response_length"),
        **pair_metrics([rollout.pair for rollout in scored.rollouts], head_rewards),
    }
    generations = [
        {
            **response.key._asdict(),
            **{f"reward/{name}": value for name, value in scored.rewards[response.key].items()},
            "prompt": rollout.pair.problem,
            "response": generator.decode(response),
            "head_reward": head_rewards[response.key],
            "answer": rollout.pair.answer,
        }
        for rollout in scored.rollouts[: config.trainer.val_generations_to_log]
        for response in rollout.responses
    ]
    return metrics, generations


def _score(batch: ScoredBatch, workers: WorkerGroup, *, copies: int) -> dict[ResponseKey, float]:
    """The head's reward of every response. `copies`: neighbouring ranks that share each row."""
    if not batch.rollouts:
        return {}
    shares = [batch.rollouts[rank // copies :: workers.world_size // copies] for rank in range(workers.world_size)]
    results = workers.call_each("score", [(share, batch.rollouts[0]) for share in shares])
    return {key: reward for result in results for key, reward in result.items()}
