"""The routes of the reward server.

    POST /v1/score          {"videos": [{"path": "/data/a.mp4"}], "prompts": ["a cat runs"]}, paths on the server
    POST /v1/score/upload   multipart form: files `videos`, fields `prompts`, in the same order
    GET  /health            200 when it takes requests, else 503; open to all
    GET  /metrics           Prometheus text

Both scoring routes answer {"results": [...], "model": ..., "scale": ...}, in order; `scale` is null for the head's own
rewards. A result is {"reward", "cot", "num_tokens", "is_finished"} or {"error"}; an error of one video concerns no
other. Every other answer is {"error"}: 400, 415 and 422 for an invalid request, 404 and 405 for other routes and
methods, 401 without the token, 403 for paths when the server has no roots, 408 and 413 for bodies that are too slow or
too large, 500 when the engine failed, 503 with Retry-After while it cannot take more.
"""

import asyncio
import contextlib
import hmac
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from scoring.source import RewardScale
from scoring.types import FailedVideo, Outcome
from serving.metrics import ServerMetrics
from serving.requests import (
    MAX_JSON_MB,
    RETRY_SOON,
    AllowedRoots,
    RefusedError,
    ServerLimits,
    Video,
    limit_body,
    read_form,
    read_json,
)
from serving.scoring_thread import ScoringThread
from verl.data.scored_sequence import judge_problem


@dataclass
class RewardService:
    """What the routes work with. `model_name`: in every answer. `folder`: takes uploads. `token`: None for none.

    `scale`: on which rewards are given, named in every answer; None for the head's own.
    """

    scoring: ScoringThread
    model_name: str
    folder: Path
    roots: AllowedRoots
    limits: ServerLimits
    metrics: ServerMetrics
    token: str | None = None
    scale: RewardScale | None = None
    _deadlines: set[asyncio.Timeout] = field(default_factory=set, init=False)

    async def require_token(self, request: Request) -> None:
        """Raise RefusedError unless the request carries the token. Compares in constant time."""
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            refusal = RefusedError(401, "unauthorized", "give the server's token: `Authorization: Bearer TOKEN`")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            raise refusal

    async def score_paths(self, request: Request) -> Response:
        """`POST /v1/score`."""
        with self.metrics.request_seconds.labels("paths").time():
            self.scoring.require_room()
            if not self.roots:
                raise RefusedError(403, "no_roots", "the server was started without --roots: upload videos instead")
            request = limit_body(request, min(MAX_JSON_MB, self.limits.max_body_mb))
            async with self._receive():
                paths, prompts = await read_json(request, self.limits)
            errors = [{"error": f"no file below the server's --roots: {path}"} for path in paths]
            videos = [self.roots.find(path) or error for path, error in zip(paths, errors, strict=True)]
            return await self._score(request, videos, prompts)

    async def score_uploads(self, request: Request) -> Response:
        """`POST /v1/score/upload`."""
        with self.metrics.request_seconds.labels("upload").time():
            self.scoring.require_room()
            request = limit_body(request, self.limits.max_body_mb)
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                async with self._receive():
                    videos, prompts = await read_form(request, self.limits, Path(folder))
                return await self._score(request, videos, prompts)

    async def health(self) -> Response:
        """`GET /health`."""
        is_ready = self.scoring.state == "ready"
        return JSONResponse({"status": self.scoring.state}, status_code=200 if is_ready else 503)

    async def read_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

    def interrupt(self) -> None:
        """Refuse the bodies that are still arriving: the server stops."""
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def _receive(self) -> AsyncIterator[None]:
        """While a body arrives: limits their number and the time of each. Raises RefusedError."""
        if len(self._deadlines) >= self.limits.max_receiving:
            raise RefusedError(503, "too_many_bodies", "too many requests are being received", retry_after=RETRY_SOON)
        seconds = self.limits.body_timeout
        deadline = asyncio.timeout(seconds)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            self.scoring.require_room()  # refuses with 503 where the deadline was moved because the server stops
            raise RefusedError(408, "slow_body", f"the body did not arrive within {seconds:g} s") from error
        finally:
            self._deadlines.discard(deadline)

    async def _score(self, request: Request, videos: Sequence[Video | dict], prompts: Sequence[str]) -> Response:
        """Results in order; those that are given in place of a video stay. Raises ClientDisconnect."""
        found = [(video, prompt) for video, prompt in zip(videos, prompts, strict=True) if isinstance(video, Video)]
        outcomes = await self._outcomes(request, [(video.path, judge_problem(prompt)) for video, prompt in found])
        scored = iter(outcomes)
        results = [self._describe(next(scored), video) if isinstance(video, Video) else video for video in videos]
        scale = None if self.scale is None else asdict(self.scale)
        return JSONResponse({"results": results, "model": self.model_name, "scale": scale})

    async def _outcomes(self, request: Request, tasks: Sequence[tuple[str, str]]) -> list[Outcome]:
        """When the client leaves, what waits is dropped; what was started is finished before its files go."""
        futures = self.scoring.submit(tasks)
        answers = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        disconnect = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({answers, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            has_left = not answers.done()
            if has_left:
                self.scoring.drop(futures)
            outcomes = await answers
        finally:
            disconnect.cancel()
            self.scoring.drop(futures)
        if has_left:
            raise ClientDisconnect
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def _describe(self, outcome: Outcome, video: Video) -> dict[str, object]:
        """The outcome as JSON, its reward on `scale`, with the client's name for the video in place of our path."""
        if isinstance(outcome, FailedVideo):
            return {"error": outcome.error.replace(video.path, video.name)}
        reward = outcome.reward if self.scale is None else self.scale.apply(outcome.reward)
        return {"reward": reward, **{name: getattr(outcome, name) for name in ("cot", "num_tokens", "is_finished")}}


def create_app(service: RewardService) -> FastAPI:
    """The application; without pages of documentation, which would load scripts from other sites."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guarded = [Depends(service.require_token)]
    app.add_api_route("/v1/score", service.score_paths, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/score/upload", service.score_uploads, methods=["POST"], dependencies=guarded)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.read_metrics, methods=["GET"], dependencies=guarded)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        reason = error.reason if isinstance(error, RefusedError) else "invalid"
        service.metrics.refused.labels(reason).inc()
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def leave(request: Request, _: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody

    return app
