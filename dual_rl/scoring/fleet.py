"""Scoring on one device in this process, or on several with Ray: one engine per device, each with its own videos."""

from collections.abc import Iterator, Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from scoring.options import ModelSource
from scoring.types import Outcome, VideoTask
from verl.config import TrainerConfig
from verl.trainer.cluster import WorkerError, connect


def score_tasks(
    source: ModelSource, tasks: Sequence[VideoTask], *, num_gpus: int, num_workers: int
) -> Iterator[Outcome]:
    """Outcomes as they become ready, in any order.

    `num_workers`: engines; each has one of the `num_gpus` GPUs of the machine (or Ray cluster) to itself, without GPUs
    a share of the CPUs. Raises ValueError for too many engines, WorkerError if one dies.
    """
    if num_workers == 1:
        yield from _score_share(source, tasks)
        return
    if num_gpus and num_workers > num_gpus:
        raise ValueError(f"{num_workers} workers for {num_gpus} GPU(s): each needs one, lower --num_workers")
    connect(TrainerConfig(n_gpus_per_node=num_workers if num_gpus else 0, n_cpu_ranks_per_node=num_workers))
    try:
        score_share = ray.remote(num_cpus=1, num_gpus=int(num_gpus > 0), max_retries=0)(_score_share)
        streams = [score_share.remote(source, tasks[index::num_workers]) for index in range(num_workers)]
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
            "an engine died: its process was killed, or crashed (if the kernel killed it for lack of memory, `dmesg` "
            "says so). The same command resumes where this run stopped"
        ) from error
    finally:
        ray.shutdown()


def _score_share(source: ModelSource, tasks: Sequence[VideoTask]) -> Iterator[Outcome]:
    with source.load() as model:
        for outcome in model.score_stream(tasks):  # noqa: UP028, Ray sends values, which lists do not take
            yield outcome
