"""Scoring on one device in this process, or on several by Ray: an engine on each, and whoever has room gets more.

Every engine keeps its videos between two calls, so that batching is continuous; a call hands new ones over and takes
what has become ready.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import ray
from ray.exceptions import RayActorError, RayTaskError

from scoring.reward_model import WINDOW, RewardModel
from scoring.scoring import Outcome, ScoringSettings, VideoTask
from verl.config import TrainerConfig
from verl.trainer.cluster import WorkerError, connect

SECONDS_PER_CALL = 1.0
"""An engine works on at least so long before it reports."""


@dataclass(frozen=True)
class ModelSource:
    """Arguments of `RewardModel.from_pretrained`."""

    model_ckpt: str
    rm_ckpt: str | None
    settings: ScoringSettings
    fresh_head_seed: int | None = None

    def load(self) -> RewardModel:
        """The model on this process's device."""
        return RewardModel.from_pretrained(
            self.model_ckpt,
            self.rm_ckpt,
            settings=self.settings,
            fresh_head_seed=self.fresh_head_seed,
        )


def score_tasks(
    source: ModelSource, tasks: Iterable[VideoTask], *, num_gpus: int, num_workers: int
) -> Iterator[Outcome]:
    """Outcomes as they become ready, in any order.

    `num_workers`: engines; each has one of the machine's (or Ray cluster's) `num_gpus` GPUs to itself, with 0 GPUs a
    share of its CPUs. Raises ValueError for too many of them, WorkerError when an engine dies.
    """
    if num_workers == 1:
        with source.load() as model:
            yield from model.score_stream(tasks)
        return
    if num_gpus and num_workers > num_gpus:
        raise ValueError(f"{num_workers} workers for {num_gpus} GPU(s): each needs one, lower --num_workers")
    settings = TrainerConfig(n_gpus_per_node=num_workers if num_gpus else 0, n_cpu_ranks_per_node=num_workers)
    connect(settings)
    try:
        yield from _score_on_actors(source, iter(tasks), num_workers=num_workers, has_gpus=num_gpus > 0)
    finally:
        ray.shutdown()


def _score_on_actors(
    source: ModelSource, tasks: Iterator[VideoTask], *, num_workers: int, has_gpus: bool
) -> Iterator[Outcome]:
    actor_class = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(ScoringActor)
    actors = [actor_class.remote(source) for _ in range(num_workers)]
    window = WINDOW * source.settings.batch_size
    under_way = dict.fromkeys(actors, 0)
    calls: dict[ray.ObjectRef, object] = {}

    def hand_over(actor) -> None:
        more = list(islice(tasks, window - under_way[actor]))
        under_way[actor] += len(more)
        if under_way[actor]:
            calls[actor.advance.remote(more)] = actor

    for actor in actors:
        hand_over(actor)
    while calls:
        (done,), _ = ray.wait(list(calls), num_returns=1)
        actor = calls.pop(done)
        outcomes = _result(done)
        under_way[actor] -= len(outcomes)
        hand_over(actor)
        yield from outcomes
    for closing in [actor.close.remote() for actor in actors]:
        _result(closing)


def _result(call: ray.ObjectRef):
    """What a call of an engine returned. Raises WorkerError for people when the engine failed or died."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise WorkerError(
            "an engine died: its process was killed, or crashed (if the kernel did it for want of memory, `dmesg` "
            "says so). The same command continues where this run stopped"
        ) from error
    except RayTaskError as error:
        raise WorkerError(str(error.cause) if isinstance(error.cause, ValueError) else str(error)) from error


class ScoringActor:
    """A reward model in a process of its own."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.model: RewardModel | None = None

    def advance(self, tasks: list[VideoTask]) -> list[Outcome]:
        """Take more tasks and work until something is ready; loads the model when called for the first time."""
        if self.model is None:
            self.model = self.source.load()
        self.model.submit(tasks)
        outcomes: list[Outcome] = []
        end = time.monotonic() + SECONDS_PER_CALL
        while self.model.num_pending and (not outcomes or time.monotonic() < end):
            outcomes += self.model.advance()
        return outcomes

    def close(self) -> None:
        """Free the engine and remove its files."""
        if self.model is not None:
            self.model.close()
