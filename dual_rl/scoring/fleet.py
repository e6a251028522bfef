"""Scoring on one device in this process, or on several with Ray: one engine per device, each fed as it has room.

An engine keeps its videos between two calls, so that batching stays continuous: a call hands over new ones and returns
what has become ready.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import islice

import ray
from ray.exceptions import RayActorError, RayTaskError

from scoring.options import ModelSource
from scoring.reward_model import WINDOW, RewardModel
from scoring.types import Outcome, VideoTask
from verl.config import TrainerConfig
from verl.trainer.cluster import WorkerError, connect

SECONDS_PER_CALL = 1.0
"""An engine works for at least this long before it reports."""


def score_tasks(
    source: ModelSource, tasks: Iterable[VideoTask], *, num_gpus: int, num_workers: int
) -> Iterator[Outcome]:
    """Outcomes as they become ready, in any order.

    `num_workers`: engines; each has one of the `num_gpus` GPUs of the machine (or Ray cluster) to itself, without GPUs
    a share of the CPUs. Raises ValueError for too many engines, WorkerError if one dies.
    """
    if num_workers == 1:
        with source.load() as model:
            yield from model.score_stream(tasks)
        return
    if num_gpus and num_workers > num_gpus:
        raise ValueError(f"{num_workers} workers for {num_gpus} GPU(s): each needs one, lower --num_workers")
    connect(TrainerConfig(n_gpus_per_node=num_workers if num_gpus else 0, n_cpu_ranks_per_node=num_workers))
    try:
        actor_class = ray.remote(num_cpus=1, num_gpus=int(num_gpus > 0))(ScoringActor)
        actors = [actor_class.remote(source) for _ in range(num_workers)]
        yield from _score_on_actors(actors, iter(tasks), window=WINDOW * source.settings.batch_size)
        ray.get([actor.close.remote() for actor in actors])
    except RayActorError as error:
        raise WorkerError(
            "an engine died: its process was killed, or crashed (if the kernel killed it for lack of memory, `dmesg` "
            "says so). The same command resumes where this run stopped"
        ) from error
    except RayTaskError as error:
        raise WorkerError(str(error.cause) if isinstance(error.cause, ValueError) else str(error)) from error
    finally:
        ray.shutdown()


def _score_on_actors(actors: list, tasks: Iterator[VideoTask], *, window: int) -> Iterator[Outcome]:
    """`window`: videos that an engine has at a time."""
    num_pending = dict.fromkeys(actors, 0)
    calls: dict[ray.ObjectRef, object] = {}
    idle, outcomes = list(actors), []
    while True:
        for actor in idle:
            more = list(islice(tasks, window - num_pending[actor]))
            num_pending[actor] += len(more)
            if num_pending[actor]:
                calls[actor.advance.remote(more)] = actor
        yield from outcomes  # now that the engine they came from has work again
        if not calls:
            return
        (done,), _ = ray.wait(list(calls), num_returns=1)
        idle = [calls.pop(done)]
        outcomes = ray.get(done)
        num_pending[idle[0]] -= len(outcomes)


class ScoringActor:
    """A reward model in a process of its own."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.model: RewardModel | None = None

    def advance(self, tasks: list[VideoTask]) -> list[Outcome]:
        """Take more tasks and work until something is ready. The first call loads the model."""
        self.model = self.model or self.source.load()
        self.model.submit(tasks)
        outcomes: list[Outcome] = []
        end = time.monotonic() + SECONDS_PER_CALL
        while self.model.num_pending and (not outcomes or time.monotonic() < end):
            outcomes += self.model.advance()
        return outcomes

    def close(self) -> None:
        """Stop the engine and remove its files."""
        if self.model is not None:
            self.model.close()
