"""The process around the application: its options, port and signals, and its end without a request left unanswered.

Granian reads the requests, since it closes connections that do not send a whole header in time.
"""

import argparse
import asyncio
import dataclasses
import logging
import resource
import signal
import socket
import tempfile
from functools import partial
from pathlib import Path

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from scoring.options import build_source
from scoring.source import (
    RewardScale,
    choose_budget,
    choose_prompt_length,
    find_calibration,
    load_calibration,
    read_checkpoint,
)
from scoring.watch import RunWatch
from serving.app import RewardService, create_app
from serving.metrics import ServerMetrics
from serving.protocols import FrameSampler
from serving.requests import AllowedRoots, ServerLimits
from serving.scoring_thread import ScoringThread
from verl.data.scored_sequence import SequenceBuilder
from verl.data.vision_process import VideoBudget, sample_frames
from verl.model.reward_files import PolicyCheckpoint
from verl.temporary import temporary_folder

HEADER_SECONDS = 10
"""For the header of a request, and for a connection without one."""
SECONDS_FOR_ANSWERS = 15
"""For answers to leave, once all are known; a client that has stopped reading cannot hold the server longer."""
SECONDS_TO_CLOSE = 20.0
"""For the engine to end after its last step; one in the middle of a long step ends with the process."""
BACKLOG = 2048

logger = logging.getLogger(__name__)


def serve(options: argparse.Namespace) -> tuple[int, bool]:
    """Serve until a signal; returns the exit status, and whether the engine has ended. Raises ValueError."""
    with temporary_folder("server") as folder:
        port = choose_port(options.host, options.port)
        service = build_service(options, folder, port)
        tempfile.tempdir = str(folder)  # so that arriving bodies and the engine's files go with it
        if service.token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("without --token_file, everyone who reaches %s can use the server", options.host)
        logger.info("listening on %s port %d", options.host, port)
        service.scoring.start()
        server = build_server(service, options.host, port)
        asyncio.run(serve_until_stopped(service, server, options.grace_seconds))
        has_replicas = service.count_engines is not None
        service.scoring.join(SECONDS_TO_CLOSE if service.scoring.has_model or has_replicas else 0.0)
    return 0 if service.scoring.failure is None else 1, not service.scoring.is_alive()


def build_service(options: argparse.Namespace, folder: Path, port: int) -> RewardService:
    """Everything but the web server, after a check of checkpoint and settings. Raises ValueError for mistakes."""
    source, metrics = build_source(options), ServerMetrics()
    limits = ServerLimits(**{limit.name: getattr(options, limit.name) for limit in dataclasses.fields(ServerLimits)})
    if source.settings.num_thoughts > limits.max_thoughts:
        raise ValueError(f"num_thoughts={source.settings.num_thoughts} is over max_thoughts={limits.max_thoughts}")
    roots, token = AllowedRoots(options.roots), read_token(options.token_file)
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt)
    choose_prompt_length(checkpoint, source.settings)
    kept = (source.model_ckpt, checkpoint, source.settings)
    scale = load_calibration(RewardScale, *kept) if options.normalize else None
    watch = RunWatch(scale or find_calibration(RewardScale, *kept))
    sample = build_sampler(choose_budget(checkpoint, source.settings), checkpoint)
    replicas = None
    if options.num_replicas != 1:
        from serving.replicas import plan_replicas  # takes seconds

        name = f"descore-{socket.gethostname()}-{options.host}-{port}"  # other machines of a cluster have servers, too
        replicas = plan_replicas(source, name, folder, options.num_replicas)
    if replicas is None:
        load, count_engines = source.load, None
    else:
        load, count_engines = partial(replicas.start, lambda: not scoring.ended.done()), replicas.count
    scoring = ScoringThread(load, max_queue=limits.max_queue, metrics=metrics)
    names = (source.model_ckpt, folder, roots, limits, metrics, sample)
    return RewardService(
        scoring,
        *names,
        token=token,
        scale=scale,
        mask_cot=source.settings.mask_cot,
        watch=watch,
        count_engines=count_engines,
    )


def build_sampler(budget: VideoBudget, checkpoint: PolicyCheckpoint) -> FrameSampler:
    """Takes and resizes frames in memory as the model's are."""
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    return partial(sample_frames, budget=budget, size_factor=builder.size_factor)


def read_token(path: str | None) -> str | None:
    """The token in a file; None without a file. Raises ValueError for a file without a token."""
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file {path}: {error}") from error
    if not token or not token.isprintable() or " " in token:
        raise ValueError(f"--token_file {path}: it must hold one word, such as `openssl rand -hex 32` writes")
    return token


def choose_port(host: str, port: int) -> int:
    """The port, a free one for 0. Raises ValueError when it is taken, before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def build_server(service: RewardService, host: str, port: int, *, header_seconds: float = HEADER_SECONDS) -> Server:
    """The web server; its `serve` runs until `stop`."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    return Server(
        create_app(service),
        host,
        port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        websockets=False,
        backlog=BACKLOG,
        backpressure=most_files // 2 if most_files > 0 else BACKLOG,  # connections; the limit may be infinite
        http1_settings=HTTP1Settings(header_read_timeout=round(1000 * header_seconds)),
        log_level=LogLevels.error,
        log_dictconfig={"loggers": {}},  # its messages go where ours go
    )


async def serve_until_stopped(service: RewardService, server: Server, grace_seconds: float) -> None:
    """SIGTERM and SIGINT stop the scoring; the end of the scoring, whatever its cause, stops the server."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        logger.info("stopping; up to %g s for what was accepted", grace_seconds)
        service.scoring.stop()
        service.interrupt()
        loop.call_later(grace_seconds, service.scoring.abandon)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.ensure_future(server.serve())
    ended = asyncio.wrap_future(service.scoring.ended)
    await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
        raise RuntimeError("Granian ended by itself")
    service.interrupt()  # after a failure of the engine
    server.stop()
    await asyncio.wait({serving}, timeout=SECONDS_FOR_ANSWERS)
