"""Responses and their rewards: videos are decoded ahead, ranks write, the plug-in rewards; and validation of these."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace

import ray

from verl.config import Config
from verl.core.advantages import compute_group_means
from verl.data.loading import PairLoader
from verl.reward.function import score_responses
from verl.trainer.cluster import WorkerGroup
from verl.trainer.inputs import Inputs
from verl.trainer.metrics import pair_metrics, response_metrics, reward_metrics
from verl.trainer.tracking import Generation
from verl.types import PairRollout, PreferencePair, Response, ResponseKey, Sampling, VideoKey

SEED_STRIDE = 1_000_003  # prime; keeps the seeds of steps, attempts and validation apart
VALIDATION_SEED = 7_919
SCORE = "val/gsb_acc"  # chooses the best checkpoint


@dataclass(frozen=True)
class ScoredBatch:
    """Pairs with their responses, and every response's rewards: `overall` and what else the plug-in returned."""

    rollouts: tuple[PairRollout, ...] = ()
    rewards: dict[ResponseKey, dict[str, float]] = field(default_factory=dict)

    @property
    def overall(self) -> dict[ResponseKey, float]:
        """The reward that is learned from."""
        return {key: scores["overall"] for key, scores in self.rewards.items()}

    @property
    def pair_ids(self) -> list[int]:
        return [rollout.pair.pair_id for rollout in self.rollouts]

    def keep(self, pair_ids: Collection[int]) -> "ScoredBatch":
        """Only the pairs named."""
        return ScoredBatch(
            tuple(rollout for rollout in self.rollouts if rollout.pair.pair_id in pair_ids),
            {key: scores for key, scores in self.rewards.items() if key.pair_id in pair_ids},
        )

    def keep_between(self, name: str, low: float, high: float) -> "ScoredBatch":
        """The pairs of which at least one video's mean reward `name` lies between the limits.

        Raises ValueError when the reward function does not return it.
        """
        for scores in self.rewards.values():
            if name not in scores:
                raise ValueError(
                    f"algorithm.filter_key={name}: the reward function does not return it. Choose one of "
                    f"{', '.join(sorted(scores))}."
                )
        means = compute_group_means({key: scores[name] for key, scores in self.rewards.items()})
        return self.keep({video.pair_id for video, mean in means.items() if low < mean < high})

    def extend(self, other: "ScoredBatch", *, limit: int) -> "ScoredBatch":
        """This batch and the first pairs of `other` that it does not hold yet, at most `limit` in all."""
        known = set(self.pair_ids)
        new = [pair_id for pair_id in other.pair_ids if pair_id not in known]
        added = other.keep(set(new[: limit - len(known)]))
        return ScoredBatch(self.rollouts + added.rollouts, self.rewards | added.rewards)

    def without_prompts(self) -> "ScoredBatch":
        """Without the references to prompts, which keep them in Ray's store."""
        return replace(self, rollouts=tuple(replace(rollout, prompts=None) for rollout in self.rollouts))


class Generator:
    """Lets the workers write responses for pairs and rewards them."""

    def __init__(self, config: Config, workers: WorkerGroup, inputs: Inputs) -> None:
        self.config = config
        self.workers = workers
        self.reward_function = inputs.reward_function
        self.tokenizer = inputs.builder.tokenizer

    def training_sampling(self, step: int, attempt: int) -> Sampling:
        """How responses of a step are drawn; `attempt` counts the batches drawn for it."""
        seed = self.config.worker.rollout.seed
        return self._sampling((seed * SEED_STRIDE + step) * SEED_STRIDE + attempt)

    def validation_sampling(self) -> Sampling:
        """How validation draws, the same in every step."""
        rollout = self.config.worker.rollout
        changed = {name: value for name, value in asdict(rollout.val_override_config).items() if value is not None}
        return self._sampling(rollout.seed * SEED_STRIDE + VALIDATION_SEED, **changed)

    def _sampling(self, seed: int, **changed: float) -> Sampling:
        rollout = self.config.worker.rollout
        values = {name: getattr(rollout, name) for name in ("n", "temperature", "top_p", "top_k")} | changed
        return Sampling(**values, max_tokens=self.config.data.max_response_length, seed=seed)

    def generate(
        self,
        source: PairLoader,
        pairs: Sequence[PreferencePair],
        sampling: Sampling,
        *,
        upcoming: Sequence[PreferencePair],
    ) -> ScoredBatch:
        """n responses for both videos of every pair of `source` that loads, with rewards.

        The videos of `upcoming` are decoded meanwhile. With tensor parallelism, neighbouring ranks share an engine.
        """
        loaded = source.load(pairs)
        source.prefetch(upcoming)
        references = [ray.put(prompts) for _, prompts in loaded]
        size = self.config.worker.rollout.tensor_parallel_size
        num_engines = self.workers.world_size // size
        arguments = [(references[rank // size :: num_engines], sampling) for rank in range(self.workers.world_size)]
        results: list[list[list[Response]]] = self.workers.call_each("generate", arguments)
        responses = {group[0].key.video: tuple(group) for result in results[::size] for group in result}
        rollouts = tuple(
            PairRollout(
                pair=pair,
                responses_a=responses[VideoKey(pair.pair_id, "A")],
                responses_b=responses[VideoKey(pair.pair_id, "B")],
                prompt_tokens=tuple(prompt.input_ids.numel() for prompt in prompts),
                prompts=reference,
            )
            for (pair, prompts), reference in zip(loaded, references, strict=True)
        )
        texts = {response.key: self.decode(response) for rollout in rollouts for response in rollout.responses}
        return ScoredBatch(rollouts, score_responses(self.reward_function, rollouts, texts=texts))

    def decode(self, response: Response) -> str:
        """The CoT as text."""
        return self.tokenizer.decode(response.cot_ids, skip_special_tokens=True)


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
