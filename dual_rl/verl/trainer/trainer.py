"""Stage 2 as an algorithm: think (roll out), judge the thoughts by rule, learn from both objectives, repeat.

The driver holds the data order, rewards and advantages, all keyed by response; the workers hold the model. How a
response is drawn depends on (seed, step, response) only, so a resumed run writes what an uninterrupted one writes.

A pair whose video no longer decodes is dropped and its batch is smaller: losses are divided by the counts of what
remains. Filling the batch up would shift every later batch, and a resumed run would have to know by how much.
"""

import logging
import statistics
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from verl.config import Config
from verl.config_loading import save_config
from verl.core.advantages import compute_advantages
from verl.core.balancing import distribute_pairs
from verl.data.batches import BatchStream
from verl.trainer.checkpoints import CheckpointFolder, load_state
from verl.trainer.cluster import WorkerGroup
from verl.trainer.generation import SCORE, Generator, ScoredBatch, run_validation
from verl.trainer.inputs import Inputs
from verl.trainer.metrics import Stopwatch, group_metrics, response_metrics, reward_metrics, speed_metrics
from verl.trainer.tracking import Tracker
from verl.types import ResponseKey
from verl.workers.optimizer import learning_rate_factor

logger = logging.getLogger(__name__)

MAX_FILTER_ROUNDS = 20  # batches that may be drawn for one step


class DualTrainer:
    """Runs stage 2 from `start_step` to the last step. Close it in any case."""

    def __init__(self, config: Config, inputs: Inputs, checkpoints: CheckpointFolder, *, start_step: int = 0) -> None:
        self.config = config
        self.inputs = inputs
        self.checkpoints = checkpoints
        self.start_step = start_step
        data = config.data
        self.stream = BatchStream(
            inputs.train.pairs, batch_size=data.rollout_batch_size, shuffle=data.shuffle, seed=data.seed
        )
        self.total_steps = config.trainer.max_steps or config.trainer.total_epochs * self.stream.steps_per_epoch
        self.workers = WorkerGroup(config)
        self.tracker = Tracker(config, self.start_step, num_steps=self.total_steps)
        self.generator = Generator(config, self.workers, inputs)

    def fit(self) -> None:
        """Dual-objective reinforcement learning: GRPO on the thoughts, Bradley-Terry on the scores."""
        settings = self.config.trainer
        if settings.val_only or (settings.val_before_train and self.start_step == 0):
            self.tracker.log(self.validate(self.start_step), self.start_step)
        if settings.val_only:
            return
        for step in range(self.start_step + 1, self.total_steps + 1):
            watch = Stopwatch(self.tracker.show_phase)
            with watch("generate"):
                batch = self.collect(step)
            with watch("prepare"):
                kl = self.prepare(batch)
            with watch("update"):
                factor = learning_rate_factor(step, self.config.worker.actor.optim, total_steps=self.total_steps)
                metrics = merge_ranks(self.workers.call("update", self.judge(batch, kl), step, factor))
            with watch("hand_over"):
                self.workers.call("hand_over_weights")
            metrics |= self.describe(batch, kl, seconds=watch.total)
            del batch  # and with it the prompts in Ray's store
            if self._is_due(step, settings.val_freq):
                with watch("validate"):
                    metrics |= self.validate(step)
            if self._is_due(step, settings.save_freq):
                with watch("save"):
                    self.save(step, val=metrics.get(SCORE))
            self.tracker.log(metrics | watch.metrics(), step)

    def collect(self, step: int) -> ScoredBatch:
        """Draw pairs, let the policy write n responses for each of their videos, and reward them by rule.

        Draws again when no pair of a batch loads; with online filtering, until `rollout_batch_size` pairs pass.
        """
        algorithm, limit = self.config.algorithm, self.stream.batch_size
        wanted = limit if algorithm.online_filtering else 1
        kept = ScoredBatch()
        for attempt in count(1):
            sampling = self.generator.training_sampling(step, attempt - 1)
            pairs = self.stream.next_batch()
            batch = self.generator.generate(self.inputs.train, pairs, sampling, upcoming=self.stream.peek())
            if algorithm.online_filtering:
                batch = batch.keep_between(algorithm.filter_key, algorithm.filter_low, algorithm.filter_high)
            kept = kept.extend(batch, limit=limit)
            if len(kept.rollouts) >= wanted:
                break
            logger.info("step %d: %d of %d pairs so far, drawing more", step, len(kept.rollouts), wanted)
            if algorithm.online_filtering and attempt == MAX_FILTER_ROUNDS:
                raise ValueError(
                    f"step {step}: {attempt} batches gave only {len(kept.rollouts)} of {wanted} pairs with a mean "
                    f"{algorithm.filter_key!r} between {algorithm.filter_low} and {algorithm.filter_high}. Widen "
                    "algorithm.filter_low and filter_high."
                )
        return kept

    def prepare(self, batch: ScoredBatch) -> dict[ResponseKey, float]:
        """Balance whole pairs over ranks by tokens; compute vision features, old and reference log-probs there.

        Returns the KL by response if it goes into the reward, else nothing.
        """
        actor = self.config.worker.actor
        mini_batches = distribute_pairs(
            batch.rollouts,
            mini_batch_size=actor.global_batch_size,
            num_ranks=self.workers.world_size,
            ulysses_size=actor.ulysses_size,
        )
        results = self.workers.call_each("prepare", [(of_rank, batch.rollouts[0]) for of_rank in mini_batches])
        return {key: kl for result in results for key, kl in result.items()}

    def judge(self, batch: ScoredBatch, kl: dict[ResponseKey, float]) -> dict[ResponseKey, float]:
        """Advantages by response, from the rewards less the KL."""
        algorithm = self.config.algorithm
        scores = {key: score - algorithm.kl_coef * kl.get(key, 0.0) for key, score in batch.overall.items()}
        return compute_advantages(scores, estimator=algorithm.adv_estimator)

    def describe(self, batch: ScoredBatch, kl: dict[ResponseKey, float], *, seconds: float) -> dict[str, float]:
        """Metrics of the step's responses, of the KL that their rewards lost, and of the speed up to the hand-over."""
        responses = [response for rollout in batch.rollouts for response in rollout.responses]
        return {
            **reward_metrics(batch.rewards),
            **group_metrics(batch.overall),
            **response_metrics(responses),
            **({"reward/kl/mean": statistics.fmean(kl.values())} if kl else {}),
            **speed_metrics(batch.rollouts, seconds=seconds, num_devices=self.workers.world_size),
        }

    def validate(self, step: int) -> dict[str, float]:
        """Metrics on the held-out pairs; sample generations go to the loggers."""
        if self.inputs.val is None:
            return {}
        metrics, generations = run_validation(self.config, self.inputs.val, self.generator, self.workers)
        self.tracker.log_generations(generations, step)
        return metrics

    def save(self, step: int, *, val: float | None) -> None:
        """Write a checkpoint that is complete or absent."""
        settings = self.config.trainer
        dropped = list(self.inputs.train.dropped.items())
        state = {"stream": self.stream.state_dict(), "identity": self.inputs.identity, "dropped": dropped}
        resumable = None if settings.save_model_only else state
        with self.checkpoints.writing(step, state=resumable, val=val, save_limit=settings.save_limit) as folder:
            self.workers.call("save", str(folder))
            save_config(self.config, folder)

    def resume(self, checkpoint: Path) -> None:
        """Restore the state of `checkpoint`, that of `start_step`."""
        state = load_state(checkpoint)
        self.stream.load_state_dict(state["stream"])
        self.inputs.train.dropped.update(state.get("dropped", ()))
        self.workers.call("load", str(checkpoint))

    def list_dropped(self) -> None:
        """List the dropped pairs once more at the end of the log."""
        for loader in filter(None, (self.inputs.train, self.inputs.val)):
            if loader.dropped:
                logger.warning("%s", loader.describe_dropped())

    def close(self) -> None:
        """End loaders, workers and loggers."""
        with ExitStack() as stack:
            stack.callback(self.tracker.close)
            stack.callback(self.workers.stop)
            for loader in filter(None, (self.inputs.train, self.inputs.val)):
                stack.callback(loader.close)

    def _is_due(self, step: int, frequency: int) -> bool:
        return step == self.total_steps or (frequency > 0 and step % frequency == 0)


def merge_ranks(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of an update: the same on every rank except memory, of which the largest counts."""
    largest = {name: max(metrics[name] for metrics in by_rank) for name in by_rank[0] if name.startswith("perf/")}
    return by_rank[0] | largest
