"""Client of an OpenAI-compatible chat server: standard library only, insists where that can help.

Lost connections, time-outs, 429 and 5xx are tried again, with pauses that double. What the server's state explains (no
connection, 429, 502, 503, 504) is insisted upon for about five minutes, and then ends the run. What may be the fault
of one request (500, a time-out) is tried three times, and then is that request's failure, like any other 4xx.
"""

import http.client
import json
import logging
import random
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

CONNECT_SECONDS = 30.0
STOPPING_STATUSES = {
    401: "it does not accept the key: give the right one with --api_key_file",
    403: "it does not accept the key: give the right one with --api_key_file",
    404: "it has no such model or address: check --model, and that --endpoint ends as the server's /v1 does",
}
BUSY_STATUSES = (429, 502, 503, 504)
NUM_OWN_RETRIES = 2
"""Of a request that may itself be what the server cannot answer."""

logger = logging.getLogger(__name__)


class ServerError(ValueError):
    """The server cannot be used, now or at all; the message says why."""


class RequestError(ValueError):
    """The server refused this request, or failed at it."""


class _Reply(NamedTuple):
    status: int
    body: bytes
    retry_after: float


@dataclass(frozen=True)
class _Trouble:
    """An attempt that may be worth another. `is_busy`: the server's state, not the request, is to blame."""

    problem: str
    is_busy: bool
    retry_after: float = 0.0


class ChatClient:
    """A server and how to insist. Safe to share between threads.

    `url`: what the paths `/chat/completions` and `/models` follow. `timeout`: seconds of silence on a connection;
    waiting in the server's queue and thinking count. `num_retries`, `first_pause`, `longest_pause`: of a busy server,
    in seconds; a longer Retry-After is honoured.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        num_retries: int = 14,
        first_pause: float = 0.5,
        longest_pause: float = 30.0,
    ) -> None:
        self._parts = urlsplit(url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise ValueError(f"--endpoint is {url!r}; give http://host:port/v1")
        self.url = url.rstrip("/")
        self.timeout, self.num_retries = timeout, num_retries
        self.first_pause, self.longest_pause = first_pause, longest_pause
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[http.client.HTTPConnection] = set()

    def find_models(self) -> dict[str, dict] | None:
        """What the server says of each model that it serves, by name; None where it keeps no such list.

        Raises ServerError when it cannot be reached or does not accept the key.
        """
        reply = self._insist("GET", "/models", None)
        if reply.status in (401, 403):
            raise ServerError(f"{self.url}: {_describe(reply)}; {STOPPING_STATUSES[reply.status]}")
        try:
            return {str(entry["id"]): entry for entry in json.loads(reply.body)["data"]}
        except (ValueError, KeyError, TypeError):
            return None

    def complete(self, body: bytes) -> Mapping[str, object]:
        """The reply to a chat request, parsed. Raises RequestError or ServerError."""
        reply = self._insist("POST", "/chat/completions", body)
        if reply.status in STOPPING_STATUSES:
            raise ServerError(f"{self.url}: {_describe(reply)}; {STOPPING_STATUSES[reply.status]}")
        if reply.status != 200:
            raise RequestError(_describe(reply))
        try:
            content = json.loads(reply.body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ServerError(f"{self.url}: the reply is none of a chat server: {reply.body[:200]!r}")
        return content

    def close(self) -> None:
        """End every request that is under way, and the pauses; they raise ServerError."""
        self._closed.set()
        with self._lock:
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _insist(self, method: str, route: str, body: bytes | None) -> _Reply:
        """A reply that is not worth another attempt."""
        pause, attempt = self.first_pause, 0
        while True:
            outcome = self._attempt(method, route, body)
            if self._closed.is_set():
                raise ServerError("the client was closed")
            if isinstance(outcome, _Reply):
                return outcome
            attempt += 1
            most = self.num_retries if outcome.is_busy else min(self.num_retries, NUM_OWN_RETRIES)
            if attempt > most:
                error = ServerError if outcome.is_busy else RequestError
                raise error(f"{self.url}{route}: gave up after {attempt} attempts: {outcome.problem}")
            seconds = max(pause * random.uniform(0.5, 1.0), outcome.retry_after)
            logger.warning("%s%s: %s; again in %.1f s", self.url, route, outcome.problem, seconds)
            self._closed.wait(seconds)
            pause = min(2 * pause, self.longest_pause)

    def _attempt(self, method: str, route: str, body: bytes | None) -> "_Reply | _Trouble":
        is_secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._parts.port, timeout=min(CONNECT_SECONDS, self.timeout))
        try:
            connection.connect()
        except OSError as error:
            return _Trouble(f"no connection: {error}", is_busy=True)
        connection.sock.settimeout(self.timeout)
        with self._lock:
            self._connections.add(connection)
        try:
            reply = _exchange(connection, method, self._parts.path.rstrip("/") + route, body, self._headers)
        except TimeoutError:
            return _Trouble(f"no reply for {self.timeout:g} s", is_busy=False)
        except (OSError, http.client.HTTPException) as error:
            return _Trouble(f"connection lost: {type(error).__name__}: {error}", is_busy=True)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
        if reply.status in BUSY_STATUSES or reply.status == 408 or reply.status >= 500:
            return _Trouble(_describe(reply), reply.status in BUSY_STATUSES, reply.retry_after)
        return reply


def _exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> _Reply:
    with suppress(BrokenPipeError, ConnectionResetError):  # an answer that comes before all was read is an answer
        connection.request(method, path, body=body, headers=dict(headers))
    response = connection.getresponse()
    retry_after = response.headers.get("Retry-After", "")
    return _Reply(response.status, response.read(), float(retry_after) if retry_after.isdecimal() else 0.0)


def _describe(reply: _Reply) -> str:
    """Status and message, in the forms of OpenAI, vLLM and FastAPI."""
    text = reply.body[:300].decode(errors="replace")
    with suppress(ValueError):
        content = json.loads(reply.body)
        error = content.get("error", content) if isinstance(content, dict) else content
        text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    return f"status {reply.status}: {' '.join(text.split())[:300]}"
