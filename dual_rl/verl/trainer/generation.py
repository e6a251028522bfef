"""Responses and their rewards: videos are decoded ahead, ranks write, the plug-in rewards."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ray

from verl.reward.function import score_responses
from verl.trainer.cluster import WorkerGroup
from verl.trainer.config import Config
from verl.trainer.preflight import Inputs
from verl.types import PairRollout, PreferencePair, Response, ResponseKey, Sampling

SEED_STRIDE = 1_000_003  # prime; keeps the seeds of steps, attempts and validation apart
VALIDATION_SEED = 7_919


@dataclass(frozen=True)
class ScoredBatch:
    """Pairs with their responses, and every response's rewards: `overall` and what else the plug-in returned."""

    rollouts: tuple[PairRollout, ...]
    rewards: dict[ResponseKey, dict[str, float]]

    def overall(self) -> dict[ResponseKey, float]:
        """The reward that is learned from."""
        return {key: scores["overall"] for key, scores in self.rewards.items()}

    def keep(self, pair_ids: Collection[int]) -> "ScoredBatch":
        """Only the pairs named."""
        return ScoredBatch(
            tuple(rollout for rollout in self.rollouts if rollout.pair.pair_id in pair_ids),
            {key: scores for key, scores in self.rewards.items() if key.pair_id in pair_ids},
        )

    def first(self, count: int) -> "ScoredBatch":
        """At most the first `count` pairs."""
        return self.keep({rollout.pair.pair_id for rollout in self.rollouts[:count]})

    def join(self, other: "ScoredBatch") -> "ScoredBatch":
        """This batch and the pairs of `other` that it does not hold yet."""
        new = other.keep({rollout.pair.pair_id for rollout in other.rollouts} - {key.pair_id for key in self.rewards})
        return ScoredBatch(self.rollouts + new.rollouts, self.rewards | new.rewards)


class Generator:
    """Lets the workers write responses for pairs and rewards them.

    `handles`: where Ray holds the prepared prompts of the pairs generated since `forget`, by pair_id.
    """

    def __init__(self, config: Config, workers: WorkerGroup, inputs: Inputs) -> None:
        self.config = config
        self.workers = workers
        self.loader = inputs.loader
        self.reward_function = inputs.reward_function
        self.tokenizer = inputs.builder.tokenizer
        self.handles: dict[int, ray.ObjectRef] = {}

    def training_sampling(self, step: int, attempt: int) -> Sampling:
        """How responses of a step are drawn; `attempt` counts the rounds of online filtering."""
        rollout = self.config.worker.rollout
        return Sampling(
            n=rollout.n,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=self.config.data.max_response_length,
            seed=(rollout.seed * SEED_STRIDE + step) * SEED_STRIDE + attempt,
        )

    def validation_sampling(self) -> Sampling:
        """How validation draws, the same in every step."""
        rollout = self.config.worker.rollout
        values = {name: getattr(rollout, name) for name in ("n", "temperature", "top_p", "top_k")}
        return Sampling(
            **(values | rollout.val_override_config),
            max_tokens=self.config.data.max_response_length,
            seed=rollout.seed * SEED_STRIDE + VALIDATION_SEED,
        )

    def generate(
        self, pairs: Sequence[PreferencePair], sampling: Sampling, *, upcoming: Sequence[PreferencePair] = ()
    ) -> ScoredBatch:
        """n responses for both videos of every pair, with rewards; meanwhile the videos of `upcoming` are decoded."""
        for pair, prompts in zip(pairs, self.loader.get(pairs), strict=True):
            self.handles[pair.pair_id] = ray.put(prompts)
        self.loader.prefetch(upcoming)
        rollouts = self._generate_on_workers(pairs, sampling)
        texts = {response.key: self.decode(response) for rollout in rollouts for response in rollout.responses}
        return ScoredBatch(rollouts, score_responses(self.reward_function, rollouts, texts=texts))

    def _generate_on_workers(self, pairs: Sequence[PreferencePair], sampling: Sampling) -> tuple[PairRollout, ...]:
        """Spread the pairs over the engines; with tensor parallelism several neighbouring ranks are one engine."""
        size = self.config.worker.rollout.tensor_parallel_size
        num_engines = self.workers.world_size // size
        shares = [range(start, len(pairs), num_engines) for start in range(num_engines)]
        arguments = []
        for rank in range(self.workers.world_size):
            mine = [pairs[index] for index in shares[rank // size]]
            arguments.append((mine, [self.handles[pair.pair_id] for pair in mine], sampling))
        results = self.workers.call_each("generate", arguments)
        by_pair = {rollout.pair.pair_id: rollout for result in results[::size] for rollout in result}
        return tuple(by_pair[pair.pair_id] for pair in pairs)

    def decode(self, response: Response) -> str:
        """The CoT as text."""
        return self.tokenizer.decode(response.cot_ids, skip_special_tokens=True)

    def forget(self) -> None:
        """Let go of the prepared prompts."""
        self.handles.clear()
