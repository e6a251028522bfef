"""The process around the application: its socket, its signals, and its end without a request left unanswered."""

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from verl.serving.app import RewardService, create_app

BACKLOG = 2048
SECONDS_FOR_ANSWERS = 15
"""For answers to leave, once all are known; a client that has stopped reading cannot hold the server longer."""
SOME_ADDRESS = ("192.0.2.1", 9)
"""Reserved for documentation; nothing is sent to it."""

logger = logging.getLogger(__name__)


class RewardServer(uvicorn.Server):
    """uvicorn as this server needs it."""

    def __init__(self, service: RewardService) -> None:
        config = uvicorn.Config(
            create_app(service),
            http="h11",  # the one of uvicorn's parsers that limits the size of headers
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=SECONDS_FOR_ANSWERS,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would close the socket at once, and end the process by the signal."""
        yield


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that takes all temporary files of the process, the engine's too, and goes with them."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def open_socket(host: str, port: int) -> socket.socket:
    """Listen, so that a taken port shows before the model is loaded. Raises ValueError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def describe_address(listener: socket.socket, *, has_token: bool) -> list[str]:
    """What to tell whoever started the server about where it is reached, and by whom."""
    host, port = listener.getsockname()[:2]
    if host == "::1" or host.startswith("127."):
        return [f"listening at {_url(host, port)}, for this machine only; others need --host 0.0.0.0"]
    is_any = host in ("0.0.0.0", "::")
    own = _own_address(listener.family) if is_any else host
    named = f" or {_url(socket.gethostname(), port)}" if is_any else ""
    lines = [f"listening on {host} port {port}; other machines use {_url(own, port)}{named}"]
    if not has_token:
        lines.append("WARNING: without --token_file, everyone who reaches this address can use the server")
    return lines


def run_server(service: RewardService, listener: socket.socket, *, grace_seconds: float) -> int:
    """Serve until SIGTERM or SIGINT (0), or until the engine fails (1)."""
    asyncio.run(_serve(service, listener, grace_seconds))
    return 0 if service.scoring.failure is None else 1


async def _serve(service: RewardService, listener: socket.socket, grace_seconds: float) -> None:
    """Signals stop the scoring; the end of the scoring, whatever its cause, stops the server."""
    server = RewardServer(service)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        logger.info("stopping; up to %g s for what was accepted", grace_seconds)
        service.scoring.stop()
        service.receiver.interrupt()
        loop.call_later(grace_seconds, service.scoring.abandon)

    def exit_server(_: object) -> None:
        service.receiver.interrupt()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    asyncio.wrap_future(service.scoring.ended).add_done_callback(exit_server)
    await server.serve(sockets=[listener])


def _own_address(family: socket.AddressFamily) -> str:
    """The address of this machine on its way out, or its name where there is no such way."""
    target = SOME_ADDRESS if family == socket.AF_INET else ("2001:db8::1", 9)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
