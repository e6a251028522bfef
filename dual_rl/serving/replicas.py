"""Several engines behind one server: Ray Serve starts them, spreads videos over them, and restarts those that die.

The server's process reads requests and answers them, as with one engine. Its scoring thread works with a
`ReplicatedModel`, which sends each video to one of the replicas: Serve's handle picks the one with fewer videos of two
random ones. What a dead replica held is sent again. Each replica is a process with a model and a scoring thread of its
own, and ends when its engine fails. Serve's own web server is not used: the limits of this one would be lost.
"""

import asyncio
import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from scoring.options import ModelSource
from scoring.reward_model import WINDOW
from scoring.types import FailedVideo, Outcome, ScoringSettings, VideoTask
from serving.metrics import ServerMetrics
from serving.scoring_thread import ScoringThread
from verl.config import TrainerConfig
from verl.data.vision_process import VideoFrames
from verl.temporary import temporary_folder
from verl.trainer.cluster import connect

MAX_ATTEMPTS = 3
"""At a video whose replica dies; the video itself may be the cause."""
STEP_SECONDS = 0.02
"""After which videos that have come in the meantime are sent."""
HEALTH_SECONDS = 2.0
"""Between Serve's looks whether a replica lives."""
SECONDS_TO_CLOSE = 5.0
"""For a replica to end by itself, after its last answer or while it loads."""

logger = logging.getLogger(__name__)


class Engine:
    """A replica. Its constructor returns when the model is loaded, and raises RuntimeError when that fails."""

    def __init__(self, source: ModelSource) -> None:
        self._files = ExitStack()
        self._folder = self._files.enter_context(temporary_folder("uploads"))
        self._scoring = ScoringThread(source.load, max_queue=sys.maxsize, metrics=ServerMetrics())
        self._scoring.start()
        while self._scoring.state == "loading":
            time.sleep(STEP_SECONDS)
        if self._scoring.failure is not None:
            raise RuntimeError(self._scoring.failure)  # Serve keeps the text
        self._scoring.ended.add_done_callback(self._exit_after_failure)

    def _exit_after_failure(self, _: Future[None]) -> None:
        if self._scoring.failure is not None:
            os._exit(1)  # Serve starts another

    def __del__(self) -> None:
        """Serve calls it before it ends a replica."""
        self._scoring.abandon()
        self._scoring.join()
        self._files.close()

    async def score(
        self, video: str | VideoFrames, content: bytes | None, problem: str, num_thoughts: int | None
    ) -> Outcome:
        """The outcome of a video, a path or frames; `content`: of the file, where it is not on this machine."""
        if content is None:
            return await self._score(video, problem, num_thoughts)
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            file.write(content)
            file.flush()
            outcome = await self._score(file.name, problem, num_thoughts)
        if isinstance(outcome, FailedVideo):
            return dataclasses.replace(outcome, error=outcome.error.replace(file.name, video))
        return outcome

    async def _score(self, *task: str | VideoFrames | int | None) -> Outcome:
        (future,) = self._scoring.submit([task])
        return await asyncio.wrap_future(future)


class ReplicatedModel:
    """All replicas together: what a ScoringThread needs of a RewardModel. Uploads, files of `folder`, go as bytes."""

    def __init__(self, handle: DeploymentHandle, settings: ScoringSettings, folder: Path) -> None:
        """`settings.batch_size`: of all replicas together."""
        self.settings = settings
        self._handle = handle
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._calls: set[asyncio.Task[Outcome]] = set()

    @property
    def num_pending(self) -> int:
        """Videos that were submitted and have no outcome yet."""
        return len(self._calls)

    def submit(self, tasks: Iterable[VideoTask]) -> None:
        """Send videos; `advance` returns the outcomes."""
        self._calls |= {self._loop.create_task(self._score(task)) for task in tasks}

    def advance(self) -> list[Outcome]:
        """Wait for a short while; outcomes that have become ready."""
        if not self._calls:
            return []
        waiting = asyncio.wait(self._calls, timeout=STEP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        done, self._calls = self._loop.run_until_complete(waiting)
        return [call.result() for call in done]

    async def _score(self, task: VideoTask) -> Outcome:
        video, content = task.video, None
        try:
            if isinstance(video, str) and self._folder in Path(video).parents:
                content = Path(video).read_bytes()
            for _ in range(MAX_ATTEMPTS):
                try:
                    outcome = await self._handle.score.remote(video, content, task.problem, task.num_thoughts)
                    return dataclasses.replace(outcome, name=task.name)
                except RayActorError:
                    logger.warning("a replica died; what it held goes to another")
            error = f"its engine died {MAX_ATTEMPTS} times"
        except RayTaskError as failure:  # its own text is a traceback with the paths of this server
            logger.warning("%s", failure)
            error = f"{type(failure.cause).__name__} in its replica"
        except (OSError, RayServeException) as failure:
            error = str(failure)
        return FailedVideo(task.name, f"{video if isinstance(video, str) else 'frames in memory'}: {error}")


@dataclass(frozen=True)
class Replicas:
    """A Serve application `name` of `num_replicas` engines with `num_gpus` GPUs each; `folder`: of uploads."""

    source: ModelSource
    name: str
    folder: Path
    num_replicas: int
    num_gpus: int

    def count(self) -> int:
        """Those that run now; none while Serve itself does not answer."""
        try:
            application = serve.status().applications.get(self.name)
        except (RayError, RayServeException):
            application = None
        deployments = application.deployments if application else {}
        return sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments.values())

    @contextmanager
    def start(self, is_wanted: Callable[[], bool]) -> Iterator[ReplicatedModel]:
        """Load all models, and end them after the block; an older application of this name is replaced.

        `is_wanted`: turns false when the server stops while models are loaded. Raises RuntimeError when one fails.
        """
        settings, quiet = self.source.settings, LoggingConfig(log_level="ERROR", enable_access_log=False)
        environment = dict(ray.get_runtime_context().runtime_env)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process, which `quiet` does not reach
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(
            Engine,
            num_replicas=self.num_replicas,
            max_ongoing_requests=WINDOW * settings.batch_size,
            ray_actor_options={"num_cpus": 1, "num_gpus": self.num_gpus, "runtime_env": environment},
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=STEP_SECONDS,
            graceful_shutdown_timeout_s=SECONDS_TO_CLOSE,
            max_constructor_retry_count=1,
            logging_config=quiet,
        )
        target = serve.RunTarget(deployment.bind(self.source), self.name, None, quiet)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        try:
            self._wait(is_wanted)
            all_settings = dataclasses.replace(settings, batch_size=self.num_replicas * settings.batch_size)
            yield ReplicatedModel(handle, all_settings, self.folder)
        finally:
            serve.delete(self.name)

    def _wait(self, is_wanted: Callable[[], bool]) -> None:
        while is_wanted() and (found := serve.status().applications[self.name]).status != "RUNNING":
            if found.status == "DEPLOY_FAILED":
                (deployment,) = found.deployments.values()
                raise RuntimeError(f"a replica cannot start: {deployment.message.rstrip().splitlines()[-1]}")
            time.sleep(STEP_SECONDS)


def plan_replicas(source: ModelSource, name: str, folder: Path, num_replicas: int | None) -> Replicas | None:
    """Join or start Ray for so many replicas, None for one on each free GPU.

    None, without touching Ray, where one engine in this process will do. Raises ValueError if GPUs are missing.
    """
    num_gpus, is_cluster = torch.cuda.device_count(), "RAY_ADDRESS" in os.environ
    if not is_cluster:
        num_replicas = num_replicas or max(1, num_gpus)
        if num_replicas == 1:
            return None
        _require_gpus(num_replicas, num_gpus)
    ranks = 1 if is_cluster else num_replicas
    connect(TrainerConfig(n_gpus_per_node=ranks if num_gpus else 0, n_cpu_ranks_per_node=ranks))
    if is_cluster:
        if name in serve.status().applications:  # of a server on this address that was killed
            serve.delete(name)
        num_gpus = int(ray.available_resources().get("GPU", 0))
        if not num_gpus and ray.cluster_resources().get("GPU"):
            raise ValueError("no GPU of the Ray cluster is free. Wait for one, or end what uses them.")
        num_replicas = num_replicas or max(1, num_gpus)
        _require_gpus(num_replicas, num_gpus)
    return Replicas(source, name, folder, num_replicas, int(num_gpus > 0))


def _require_gpus(num_replicas: int, num_gpus: int) -> None:
    if num_gpus and num_replicas > num_gpus:
        raise ValueError(f"--num_replicas is {num_replicas}, but {num_gpus} GPU(s) are free. Lower it, or give auto.")
