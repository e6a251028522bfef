"""Ray: the cluster, one worker per GPU (or CPU rank), and calls that cannot hang when one of them fails."""

import atexit
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config import Config, TrainerConfig
from verl.temporary import remove_abandoned_folders, temporary_folder
from verl.workers.worker import Worker

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_SECONDS = 10
PLACEMENT_TIMEOUT_SECONDS = 120
CLOSE_SECONDS = 5.0
SECONDS_FOR_OTHER_FAILURES = 5.0  # one rank's failure makes others fail, and the cause need not be the first to arrive
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also transformers' own
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of ranks that fail because another did
}
"""Environment of driver and workers, which keeps libraries' notes off the console. Users' own values win."""
MAX_SESSION_FOLDER_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Paths of Unix sockets have at most 107 bytes."""
session_folders = ExitStack()


class WorkerError(RuntimeError):
    """A worker failed or died; the message says which and why."""


def connect(settings: TrainerConfig) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine for this run.

    Raises ValueError when it has fewer nodes, GPUs or CPUs than the settings ask for.
    """
    environment = {name: os.environ.setdefault(name, value) for name, value in QUIET_LIBRARIES.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    if settings.n_gpus_per_node:
        name = "PYTORCH_CUDA_ALLOC_CONF"  # by this name, vLLM knows to leave it out of the memory that sleeps
        environment[name] = os.environ.get(name, "expandable_segments:True")  # rows of many lengths
    else:  # CPU ranks share the cores; more threads than cores wait for each other
        threads = max(1, (os.cpu_count() or 1) // settings.n_cpu_ranks_per_node)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads)
    arguments = {"logging_level": logging.ERROR, "log_to_driver": True, "runtime_env": {"env_vars": environment}}
    address = os.environ.get("RAY_ADDRESS")
    if address or settings.nnodes > 1:
        try:
            _require_answer(address)
            ray.init(address=address, **arguments)
        except ConnectionError as error:
            reason = f"nothing answers at RAY_ADDRESS={address}" if address else "RAY_ADDRESS is not set"
            raise ValueError(
                f"no Ray cluster to join, {reason}: start it with `ray start --head` here and "
                "`ray start --address=HEAD:6379` on the other nodes, with the same RAY_AUTH_MODE and token "
                "everywhere; or unset RAY_ADDRESS and set trainer.nnodes=1"
            ) from error
    else:
        num_cpus = max(os.cpu_count() or 1, settings.ranks_per_node)
        folder = _choose_session_folder()
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=folder, **arguments)
    _require_resources(settings)


@atexit.register
def disconnect() -> None:
    """Leave the cluster, or end it, and remove the temporary folders of its processes."""
    ray.shutdown()
    session_folders.close()
    remove_abandoned_folders()


def _require_answer(address: str | None) -> None:
    """Raise ConnectionError if nothing listens at host:port; Ray itself would wait for many minutes.

    Without an address, Ray would join any cluster that it finds on this machine, perhaps another user's.
    """
    host, separator, port = (address or "").rpartition(":")
    if not address:
        raise ConnectionError
    if separator and "://" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_SECONDS).close()
        except OSError as error:
            raise ConnectionError from error


def _choose_session_folder() -> str | None:
    """A temporary folder for Ray's sessions; None, for Ray's default, where users choose one or the path is too long
    for the sockets in it."""
    if "RAY_TMPDIR" in os.environ:
        return None
    folder = session_folders.enter_context(temporary_folder("ray"))
    if len(os.fsencode(folder)) > MAX_SESSION_FOLDER_BYTES:
        logger.warning("TMPDIR is too long a path for Ray's sockets: Ray's files stay in its default folder")
        return None
    return str(folder)


def _require_resources(settings: TrainerConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind, key = ("GPU", "n_gpus_per_node") if settings.n_gpus_per_node else ("CPU", "n_cpu_ranks_per_node")
    wanted = settings.ranks_per_node
    if sum(node.get(kind, 0) >= wanted for node in nodes) < settings.nnodes:
        found = ", ".join(f"{node.get(kind, 0):g} {kind}(s)" for node in nodes)
        raise ValueError(
            f"the run asks for {settings.nnodes} node(s) with {wanted} {kind}(s) each, but the Ray cluster has "
            f"{len(nodes)} node(s) with {found}. Lower trainer.nnodes or trainer.{key}"
            f"{'; trainer.n_gpus_per_node=0 trains on CPUs' if kind == 'GPU' else ''}."
        )


class WorkerGroup:
    """One worker per rank; node i has the ranks from i * ranks_per_node on."""

    def __init__(self, config: Config) -> None:
        settings = config.trainer
        self.world_size = settings.num_ranks
        actor_class = ray.remote(num_cpus=1, num_gpus=min(settings.n_gpus_per_node, 1))(Worker)
        reserved = _reserve(settings)
        self._actors = []
        for rank in range(self.world_size):
            node = PlacementGroupSchedulingStrategy(
                reserved, placement_group_bundle_index=rank // settings.ranks_per_node
            )
            self._actors.append(actor_class.options(scheduling_strategy=node).remote(config, rank, self.world_size))
        ((address, port),) = self._wait("choose_meeting_point", [self._actors[0].choose_meeting_point.remote()])
        logger.info("loading the model and starting the rollout engine, ranks: %d", self.world_size)
        self.call("start", address, port)

    def call(self, method: str, *arguments: object) -> list:
        """Call a method with the same arguments on every rank; results in order of rank."""
        return self.call_each(method, [arguments] * len(self._actors))

    def call_each(self, method: str, per_rank: Sequence[tuple]) -> list:
        """Call a method with each rank's own arguments; results in order of rank."""
        calls = zip(self._actors, per_rank, strict=True)
        return self._wait(method, [getattr(actor, method).remote(*arguments) for actor, arguments in calls])

    def _wait(self, method: str, calls: list[ray.ObjectRef]) -> list:
        """Results of all calls; the first failure ends the wait, since other ranks may be waiting for that one."""
        pending = calls
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            if _find_failures(done):
                more, _ = ray.wait(pending, num_returns=len(pending), timeout=SECONDS_FOR_OTHER_FAILURES)
                failures = _find_failures([*done, *more])
                self.stop()
                cause = min(failures, key=lambda call: _order_of_cause(failures[call]))
                raise WorkerError(_describe(failures[cause], calls.index(cause), method)) from failures[cause]
        return ray.get(calls)

    def stop(self) -> None:
        """Let every worker that is not held up by a collective remove its files, and end all; may be called twice."""
        closing = [actor.close.remote() for actor in self._actors]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for actor in self._actors:
            with suppress(RayError):  # it is gone already
                ray.kill(actor)
        self._actors = []


def _reserve(settings: TrainerConfig) -> PlacementGroup:
    """One bundle per node, each on a node of its own."""
    bundle = {"CPU": settings.ranks_per_node} | ({"GPU": settings.n_gpus_per_node} if settings.n_gpus_per_node else {})
    group = placement_group([bundle] * settings.nnodes, strategy="STRICT_SPREAD")
    if not group.wait(PLACEMENT_TIMEOUT_SECONDS):
        raise ValueError(
            f"{settings.nnodes} node(s) with {settings.ranks_per_node} free GPU(s) or CPU(s) each could not be "
            f"reserved within {PLACEMENT_TIMEOUT_SECONDS} s. Is another run on this cluster? See `ray status`."
        )
    return group


def _find_failures(references: Sequence[ray.ObjectRef]) -> dict[ray.ObjectRef, RayError]:
    """Of finished calls, those that failed, and how."""
    failures = {}
    for reference in references:
        try:
            ray.get(reference)
        except (RayTaskError, RayActorError) as error:
            failures[reference] = error
    return failures


def _order_of_cause(error: RayError) -> int:
    """The likely cause first: a dead rank, then a user's mistake, then what may follow from either."""
    if isinstance(error, RayActorError):
        return 0
    return 1 if isinstance(error.cause, ValueError) else 2


def _describe(error: RayError, rank: int, method: str) -> str:
    if isinstance(error, RayActorError):
        return (
            f"rank {rank} died in {method}(): its process was killed, or crashed (if the kernel did it for want of "
            "memory, `dmesg` says so). The same command continues from the last checkpoint"
        )
    if isinstance(error.cause, (ValueError, RuntimeError, OSError)) and not isinstance(error.cause, RayError):
        return f"rank {rank}: {error.cause}"
    return f"rank {rank}: {error}"
