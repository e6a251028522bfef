"""Training batches: worker processes render more clips and write texts while the model trains."""

import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import torch

from toy_batches import Batch, ClipPool, ToyClip, make_clips, make_texts, to_text_batch

logger = logging.getLogger(__name__)

CLIPS_PER_TASK = 32
TEXT_TASKS_PER_WORKER = 2
LARGEST_BUCKET_PART = 3  # the pool's size over that of its largest bucket of equal grid
MIN_POOL_FRACTION = 0.03  # of the pool, rendered before training starts
HELD_OUT_SEED = 10_000_000  # far from the seeds of training tasks
SEED_STRIDE = 1_000_000

_processor = None  # set before the workers are forked, which inherit it


def _start_worker() -> None:
    torch.set_num_threads(1)


def _clip_task(seed: int, held_out: bool) -> list[ToyClip]:
    return make_clips(_processor, seed=seed, count=CLIPS_PER_TASK, held_out=held_out)


def _text_task(seed: int, clips: list) -> tuple[np.ndarray, np.ndarray]:
    return make_texts(_processor, seed=seed, clips=clips)


class BatchSource:
    """Yields batches without end. Must be created before anything touches the GPU, since its workers are forked.

    The pool grows to `pool_size` clips during training; `held_out_pool` holds `num_held_out` clips after `start`.
    """

    def __init__(
        self,
        processor,
        *,
        num_workers: int,
        pool_size: int,
        num_held_out: int,
        seed: int,
    ) -> None:
        global _processor
        _processor = processor
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers must not start threads before the fork
        self.num_workers, self.pool_size, self.num_held_out = num_workers, pool_size, num_held_out
        self.rng = np.random.default_rng(seed)
        self.first_seed = seed * SEED_STRIDE
        self.num_tasks = 0
        self.wait_seconds = 0.0  # how long training has waited for texts
        self.executor = ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker
        )
        self.clip_futures: deque[Future] = deque(self._submit_clips() for _ in range(num_workers))
        num_tasks = -(-num_held_out // CLIPS_PER_TASK)
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + num_tasks)
        self.held_out_futures = [self.executor.submit(_clip_task, task_seed, True) for task_seed in seeds]
        self.text_futures: deque = deque()

    def start(self, device: torch.device) -> None:
        """Wait for the held-out clips and enough training clips to begin with."""
        self.device = device
        self.pool = ClipPool(device, capacity=self.pool_size // LARGEST_BUCKET_PART)
        self.held_out_pool = ClipPool(device, capacity=self.num_held_out)
        for future in self.held_out_futures:
            self.held_out_pool.add(future.result())
        while len(self.pool) < MIN_POOL_FRACTION * self.pool_size:
            self._collect_clips(wait=True)
        logger.info("%d training clips, %d held-out clips", len(self.pool), len(self.held_out_pool))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Training batches of one grid each."""
        while True:
            self._collect_clips(wait=False)
            while len(self.text_futures) < TEXT_TASKS_PER_WORKER * self.num_workers:
                grid, indices = self.pool.draw(self.rng, batch_size)
                clips = [self.pool.items[grid][index] for index in indices]
                future = self.executor.submit(_text_task, self._next_seed(), clips)
                self.text_futures.append((future, grid, indices))
            future, grid, indices = self.text_futures.popleft()
            asked = time.monotonic()
            arrays = future.result()
            self.wait_seconds += time.monotonic() - asked
            text = to_text_batch(*arrays, self.device)
            yield Batch(text, self.pool.pixel_values(grid, indices), grid)

    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """All held-out clips with their own requests; the same texts each time."""
        for grid, items in self.held_out_pool.items.items():
            for start in range(0, len(items), batch_size):
                indices = np.arange(start, min(start + batch_size, len(items)))
                arrays = make_texts(_processor, seed=HELD_OUT_SEED, clips=[items[index] for index in indices])
                text = to_text_batch(*arrays, self.device)
                yield Batch(text, self.held_out_pool.pixel_values(grid, indices), grid)

    def close(self) -> None:
        """Stop the workers; what is not done yet is dropped."""
        self.executor.shutdown(cancel_futures=True)

    def _next_seed(self) -> int:
        self.num_tasks += 1
        return self.first_seed + self.num_tasks

    def _submit_clips(self) -> Future:
        return self.executor.submit(_clip_task, self._next_seed(), False)

    def _collect_clips(self, *, wait: bool) -> None:
        """Put finished clips into the pool and order new ones until it is full."""
        while self.clip_futures and (wait or self.clip_futures[0].done()):
            self.pool.add(self.clip_futures.popleft().result())
            if len(self.pool) + len(self.clip_futures) * CLIPS_PER_TASK < self.pool_size:
                self.clip_futures.append(self._submit_clips())
            wait = False
