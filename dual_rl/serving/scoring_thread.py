"""The one thread that owns the reward model: requests put videos into its queue and hold a future for each.

The model is loaded, used and closed in this thread, since it works in one thread only. Videos of all requests share
its batches: the one that has waited longest goes next, as soon as another is done.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import count
from typing import Literal

from starlette.exceptions import HTTPException

from scoring.reward_model import WINDOW, RewardModel
from scoring.types import Outcome, ScoredVideo, VideoTask
from serving.metrics import ServerMetrics
from serving.requests import RETRY_LATER, RETRY_SOON, refuse
from verl.data.vision_process import VideoFrames

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "stopping", "stopped", "failed"]


class ScoringThread(threading.Thread):
    """`submit` and `drop` videos from any thread. Every future gets an outcome, is cancelled, or raises HTTPException.

    `load`: returns the model; `max_queue`: videos that may wait. `ended`: done when no more answers will come;
    `failure` then says why, if the engine failed. `has_model`: loading is over.
    """

    def __init__(self, load: Callable[[], RewardModel], *, max_queue: int, metrics: ServerMetrics) -> None:
        super().__init__(name="scoring", daemon=True)
        self.state: State = "loading"
        self.failure: str | None = None
        self.has_model = False
        self.ended: Future[None] = Future()
        self.metrics = metrics
        self.max_queue = max_queue
        self._load = load
        self._numbers = count()
        self._waiting: deque[tuple[VideoTask, Future[Outcome]]] = deque()
        self._running: dict[str, Future[Outcome]] = {}
        self._changed = threading.Condition()
        metrics.queue_length.set_function(lambda: len(self._waiting))
        metrics.in_flight.set_function(lambda: len(self._running))

    def require_room(self, num_videos: int = 1) -> None:
        """Raise HTTPException unless as many videos would be taken now."""
        if self.state == "failed":
            raise refuse(500, f"the engine failed: {self.failure}")
        if self.state != "ready":
            raise refuse(503, f"the server is {self.state}", retry_after=RETRY_LATER)
        if len(self._waiting) + num_videos > self.max_queue:
            message = f"the queue is full: {len(self._waiting)} of {self.max_queue} videos wait"
            raise refuse(503, message, retry_after=RETRY_SOON)

    def submit(self, videos: Sequence[tuple[str | VideoFrames, str, int | None]]) -> list[Future[Outcome]]:
        """Queue all of these videos, problems and numbers of thoughts, or raise HTTPException and queue none."""
        with self._changed:
            self.require_room(len(videos))
            entries = [(VideoTask(str(next(self._numbers)), *video), Future()) for video in videos]
            self._waiting.extend(entries)
            self._changed.notify()
        return [future for _, future in entries]

    def drop(self, futures: Sequence[Future[Outcome]]) -> None:
        """Forget those that have not started; their futures are cancelled."""
        with self._changed:
            num_dropped = sum(future.cancel() for future in futures if not future.done())
            self._waiting = deque(entry for entry in self._waiting if not entry[1].cancelled())
        self.metrics.videos.labels("dropped").inc(num_dropped)

    def stop(self) -> None:
        """Take nothing more and end when all that was taken is scored; at once while loading."""
        if self.state == "loading":
            self.abandon()
        with self._changed:
            if self.state == "ready":
                self.state = "stopping"
                self._changed.notify()

    def abandon(self) -> None:
        """Refuse what has not been scored by now; the thread ends after its current step."""
        self._end("stopped", refuse(503, "the server has stopped", retry_after=RETRY_LATER))

    def run(self) -> None:
        """The thread's work."""
        with ExitStack() as stack:
            try:
                model = stack.enter_context(self._load())
                self.has_model = True
                self._score_until_stopped(model)
            except BaseException as error:
                self.failure = f"{type(error).__name__}: {error}"
                self._end("failed", refuse(500, f"the engine failed: {self.failure}"))
                raise
            self.abandon()  # before the model is closed, which may take a while

    def _score_until_stopped(self, model: RewardModel) -> None:
        with self._changed:
            if self.state == "loading":
                self.state = "ready"
                logger.info("ready")
        window = WINDOW * model.settings.batch_size
        while (tasks := self._take(window - model.num_pending, should_wait=not model.num_pending)) is not None:
            model.submit(tasks)
            for outcome in model.advance():
                self._answer(outcome)

    def _take(self, num_videos: int, *, should_wait: bool) -> list[VideoTask] | None:
        """The next videos to start, at most `num_videos`; None when there is no more to do."""
        with self._changed:
            while should_wait and self.state == "ready" and not self._waiting:
                self._changed.wait()
            if self.state == "stopped" or (should_wait and not self._waiting):
                return None
            entries = [self._waiting.popleft() for _ in range(min(num_videos, len(self._waiting)))]
            started = [(task, future) for task, future in entries if future.set_running_or_notify_cancel()]
            self._running.update((task.name, future) for task, future in started)
            return [task for task, _ in started]

    def _answer(self, outcome: Outcome) -> None:
        with self._changed:
            future = self._running.pop(outcome.name, None)
        if future is not None:  # else it was abandoned
            self.metrics.videos.labels("scored" if isinstance(outcome, ScoredVideo) else "failed").inc()
            future.set_result(outcome)

    def _end(self, state: State, refusal: HTTPException) -> None:
        with self._changed:
            if self.ended.done():
                return
            self.state = state
            waiting = [future for _, future in self._waiting if future.set_running_or_notify_cancel()]
            futures = [*self._running.values(), *waiting]
            self._running.clear()
            self._waiting.clear()
            self._changed.notify()
            self.ended.set_result(None)
        for future in futures:
            future.set_exception(refusal)
