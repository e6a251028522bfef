"""Scoring on one device in this process, or on several with Ray: one engine per device, each with its own videos."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import ray
from ray.exceptions import RayError, RayTaskError

from scoring.options import ModelSource
from scoring.types import Outcome, VideoTask
from verl.config import TrainerConfig
from verl.trainer.cluster import WorkerError, connect

SECONDS_TO_CLOSE = 20.0


class Engines:
    """Engines that start with the first tasks and stay until the end of the `with` block.

    `num_workers`: each has one of the `num_gpus` GPUs of the machine (or Ray cluster) to itself, without GPUs a share
    of the CPUs. Raises ValueError for too many.
    """

    def __init__(self, source: ModelSource, *, num_gpus: int, num_workers: int) -> None:
        if num_gpus and num_workers > num_gpus:
            raise ValueError(f"{num_workers} workers for {num_gpus} GPU(s): each needs one, lower --num_workers")
        self.num_gpus, self.num_workers = num_gpus, num_workers
        self._engine, self._actors = _Engine(source), []
        self._source = source

    def score(self, tasks: Sequence[VideoTask]) -> Iterator[Outcome]:
        """Outcomes as they become ready, in any order. Raises WorkerError if an engine dies."""
        if self.num_workers == 1:
            yield from self._engine.score(tasks)
            return
        try:
            self._actors = self._actors or self._start()
            streams = [
                actor.score.remote(tasks[index :: self.num_workers]) for index, actor in enumerate(self._actors)
            ]
            while streams:
                (stream,), _ = ray.wait(streams, num_returns=1)
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
        except RayTaskError as error:
            raise WorkerError(str(error.cause) if isinstance(error.cause, ValueError) else str(error)) from error
        except RayError as error:
            raise WorkerError(
                "an engine died: its process was killed, or crashed (if the kernel killed it for lack of memory, "
                "`dmesg` says so). The same command resumes where this run stopped"
            ) from error

    def _start(self) -> list:
        num_gpus, num_workers = self.num_gpus, self.num_workers
        connect(TrainerConfig(n_gpus_per_node=num_workers if num_gpus else 0, n_cpu_ranks_per_node=num_workers))
        actor = ray.remote(num_cpus=1, num_gpus=int(num_gpus > 0), max_restarts=0)(_Engine)
        return [actor.remote(self._source) for _ in range(num_workers)]

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._engine.close()
        if self.num_workers > 1:
            if self._actors and kind is None:  # else they are dead or busy
                closing = [actor.close.remote() for actor in self._actors]
                ray.wait(closing, num_returns=len(closing), timeout=SECONDS_TO_CLOSE)
            ray.shutdown()


class _Engine:
    """A model that is loaded with its first tasks."""

    def __init__(self, source: ModelSource) -> None:
        self._source, self._stack, self._model = source, ExitStack(), None

    def score(self, tasks: Sequence[VideoTask]) -> Iterator[Outcome]:
        """Outcomes as they become ready."""
        if self._model is None and tasks:
            self._model = self._stack.enter_context(self._source.load())
        for outcome in self._model.score_stream(tasks) if tasks else ():  # noqa: UP028, Ray sends values, which lists do not take
            yield outcome

    def close(self) -> None:
        """Stop the model if it was loaded."""
        self._stack.close()
