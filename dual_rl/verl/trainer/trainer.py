"""Stage 2 as an algorithm: think (roll out), judge the thoughts by rule, learn from both objectives, repeat.

The driver holds the data order, rewards and advantages, all keyed by response; the workers hold the model. The draw of
a response depends on (seed, step, response) only, so that a resumed run writes what the uninterrupted one would have.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl.core.advantages import compute_advantages, compute_group_means
from verl.core.balancing import distribute_pairs
from verl.data.batches import BatchStream
from verl.trainer.checkpoints import CheckpointFolder, load_state, step_of
from verl.trainer.cluster import WorkerGroup
from verl.trainer.config import Config
from verl.trainer.generation import Generator, ScoredBatch
from verl.trainer.metrics import (
    Stopwatch,
    group_metrics,
    packing_metrics,
    response_metrics,
    reward_metrics,
    throughput_metrics,
)
from verl.trainer.settings import save_config
from verl.trainer.tracking import Tracker
from verl.trainer.validation import SCORE, Validator
from verl.types import PairRollout, PreferencePair, ResponseKey
from verl.workers.optimizer import learning_rate_factor

logger = logging.getLogger(__name__)

RankShard = list[list[PairRollout]]  # one rank's pairs, by mini-batch


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `validator` is None without held-out pairs. `model_identity`: what it started from."""

    workers: WorkerGroup
    stream: BatchStream
    generator: Generator
    validator: Validator | None
    checkpoints: CheckpointFolder
    tracker: Tracker
    model_identity: dict[str, object]


class DualTrainer:
    """Runs stage 2 from `start_step` to the last step."""

    def __init__(self, config: Config, parts: Parts, *, start_step: int = 0) -> None:
        self.config = config
        self.workers, self.stream, self.generator = parts.workers, parts.stream, parts.generator
        self.validator, self.checkpoints, self.tracker = parts.validator, parts.checkpoints, parts.tracker
        self.model_identity = parts.model_identity
        self.start_step = start_step
        self.total_steps = count_steps(config, parts.stream)

    def fit(self) -> None:
        """Dual-objective reinforcement learning: GRPO on the thoughts, Bradley-Terry on the scores."""
        settings = self.config.trainer
        if settings.val_only or (settings.val_before_train and self.start_step == 0):
            self.tracker.log(self.validate(self.start_step), self.start_step)
        if settings.val_only:
            return
        for step in range(self.start_step + 1, self.total_steps + 1):
            watch = Stopwatch()
            with self._phase("generate", watch):
                batch = self.collect(step)
            with self._phase("prepare", watch):
                shards = self.distribute(batch)
                kl = self.prepare(shards)
            with self._phase("update", watch):
                metrics = self.update(step, self.judge(batch, kl))
            with self._phase("hand_over", watch):
                self.workers.call("hand_over_weights")
            metrics |= self.describe(batch, kl, seconds=watch.total)
            self.generator.forget()
            if self._is_due(step, settings.val_freq):
                with self._phase("validate", watch):
                    metrics |= self.validate(step)
            if self._is_due(step, settings.save_freq):
                with self._phase("save", watch):
                    self.save(step, val=metrics.get(SCORE))
            self.tracker.log(metrics | watch.metrics(), step)

    def collect(self, step: int) -> ScoredBatch:
        """Draw pairs, let the policy write n responses for each of their videos, and reward them by rule.

        With online filtering, draws on until `rollout_batch_size` pairs can teach something.
        """
        algorithm, wanted = self.config.algorithm, self.stream.batch_size
        if not algorithm.online_filtering:
            return self._generate(self.stream.next_batch(), step, 0)
        kept = ScoredBatch((), {})
        for attempt in range(algorithm.max_filter_rounds):
            batch = self._generate(self.stream.next_batch(), step, attempt)
            kept = kept.join(self._filter(batch)).first(wanted)
            if len(kept.rollouts) == wanted:
                return kept
            logger.info("step %d: %d of %d pairs pass the filter, drawing more", step, len(kept.rollouts), wanted)
        raise ValueError(
            f"step {step}: {algorithm.max_filter_rounds} batches gave only {len(kept.rollouts)} of {wanted} pairs "
            f"with a mean {algorithm.filter_key!r} between {algorithm.filter_low} and {algorithm.filter_high}; widen "
            "algorithm.filter_low and filter_high or raise algorithm.max_filter_rounds"
        )

    def _generate(self, pairs: Sequence[PreferencePair], step: int, attempt: int) -> ScoredBatch:
        sampling = self.generator.training_sampling(step, attempt)
        return self.generator.generate(pairs, sampling, upcoming=self.stream.peek())

    def _filter(self, batch: ScoredBatch) -> ScoredBatch:
        """The pairs of which at least one video's group has a mean between the limits."""
        algorithm = self.config.algorithm
        returned = set.intersection(*(set(scores) for scores in batch.rewards.values()))
        if algorithm.filter_key not in returned:
            raise ValueError(
                f"algorithm.filter_key={algorithm.filter_key}: the reward function does not return it for every "
                f"response; choose one of {', '.join(sorted(returned))}"
            )
        means = compute_group_means({key: scores[algorithm.filter_key] for key, scores in batch.rewards.items()})
        passing = {
            video.pair_id for video, mean in means.items() if algorithm.filter_low < mean < algorithm.filter_high
        }
        return batch.keep(passing)

    def distribute(self, batch: ScoredBatch) -> list[RankShard]:
        """Whole pairs to ranks, by tokens, inside each mini-batch of `global_batch_size` pairs."""
        actor = self.config.worker.actor
        return distribute_pairs(
            batch.rollouts,
            mini_batch_size=actor.global_batch_size,
            num_ranks=self.workers.world_size,
            ulysses_size=actor.ulysses_size,
        )

    def prepare(self, shards: list[RankShard]) -> dict[ResponseKey, float]:
        """Vision features, old and reference log-probs on the ranks; KL by response where the reward takes it."""
        arguments = []
        for shard in shards:
            pair_ids = [rollout.pair.pair_id for mini_batch in shard for rollout in mini_batch]
            arguments.append((shard, {pair_id: self.generator.handles[pair_id] for pair_id in pair_ids}))
        results: list[dict[ResponseKey, float]] = self.workers.call_each("prepare_step", arguments)
        return {key: kl for result in results for key, kl in result.items()}

    def judge(self, batch: ScoredBatch, kl: dict[ResponseKey, float]) -> dict[ResponseKey, float]:
        """Advantages by response, from the rewards less the KL."""
        algorithm = self.config.algorithm
        scores = {key: score - algorithm.kl_coef * kl.get(key, 0.0) for key, score in batch.overall().items()}
        return compute_advantages(scores, estimator=algorithm.adv_estimator)

    def update(self, step: int, advantages: dict[ResponseKey, float]) -> dict[str, float]:
        """All optimizer steps on the batch; metrics over all ranks."""
        factor = learning_rate_factor(step, self.config.worker.actor.optim, total_steps=self.total_steps)
        by_rank: list[dict[str, float]] = self.workers.call("update", advantages, step, factor)
        return {
            name: max(metrics[name] for metrics in by_rank) if name.startswith("perf/") else value
            for name, value in by_rank[0].items()
        }

    def describe(self, batch: ScoredBatch, kl: dict[ResponseKey, float], *, seconds: float) -> dict[str, float]:
        """Metrics of the step's responses, of the KL that their rewards lost, and of the speed up to the hand-over."""
        responses = [response for rollout in batch.rollouts for response in rollout.responses]
        return {
            **reward_metrics(batch.rewards),
            **group_metrics(batch.overall()),
            **response_metrics(responses),
            **({"reward/kl/mean": statistics.fmean(kl.values())} if kl else {}),
            **packing_metrics(batch.rollouts),
            **throughput_metrics(batch.rollouts, seconds=seconds, num_devices=self.workers.world_size),
        }

    def validate(self, step: int) -> dict[str, float]:
        """Metrics on the held-out pairs; sample generations go to the loggers."""
        if self.validator is None:
            return {}
        metrics, samples = self.validator.validate()
        self.tracker.log_generations(samples, step)
        return metrics

    def save(self, step: int, *, val: float | None) -> None:
        """Write a checkpoint that is complete or absent."""
        settings = self.config.trainer
        state = {"stream": self.stream.state_dict(), "model": self.model_identity}
        resumable = None if settings.save_model_only else state
        with self.checkpoints.writing(step, state=resumable, val=val, save_limit=settings.save_limit) as folder:
            self.workers.call("save", str(folder))
            save_config(self.config, folder)

    def resume(self, checkpoint: Path) -> None:
        """Continue after the step of `checkpoint`."""
        self.stream.load_state_dict(load_state(checkpoint)["stream"])
        self.workers.call("load", str(checkpoint))
        self.start_step = step_of(checkpoint)

    @contextmanager
    def _phase(self, name: str, watch: Stopwatch) -> Iterator[None]:
        self.tracker.show_phase(name)
        with watch(name):
            yield

    def _is_due(self, step: int, frequency: int) -> bool:
        return step == self.total_steps or (frequency > 0 and step % frequency == 0)


def count_steps(config: Config, stream: BatchStream) -> int:
    """Steps of the whole run."""
    return config.trainer.max_steps or config.trainer.total_epochs * stream.steps_per_epoch
