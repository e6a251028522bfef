"""The process around the application: its port, its signals, and its end without a request left unanswered.

Granian reads the requests, since it closes connections that do not send a whole header in time.
"""

import asyncio
import logging
import resource
import signal
import socket

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from serving.app import RewardService, create_app

HEADER_SECONDS = 10
"""For the header of a request, and for a connection without one."""
SECONDS_FOR_ANSWERS = 15
"""For answers to leave, once all are known; a client that has stopped reading cannot hold the server longer."""
BACKLOG = 2048

logger = logging.getLogger(__name__)


def choose_port(host: str, port: int) -> int:
    """The port, a free one for 0. Raises ValueError when it is taken, before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def build_server(service: RewardService, host: str, port: int, *, header_seconds: float = HEADER_SECONDS) -> Server:
    """The web server, which `serve` starts and `stop` ends."""
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


def run_server(service: RewardService, host: str, port: int, *, grace_seconds: float) -> int:
    """Serve until SIGTERM or SIGINT (0), or until the engine fails (1)."""
    asyncio.run(_serve(service, build_server(service, host, port), grace_seconds))
    return 0 if service.scoring.failure is None else 1


async def _serve(service: RewardService, server: Server, grace_seconds: float) -> None:
    """Signals stop the scoring; the end of the scoring, whatever its cause, stops the server."""
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
    service.interrupt()  # of a failed engine
    server.stop()
    await asyncio.wait({serving}, timeout=SECONDS_FOR_ANSWERS)
