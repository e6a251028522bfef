"""The routes of the reward server.

    POST /v1/score          {"videos": [{"path": "/data/a.mp4"}], "prompts": ["a cat runs"]}, paths on the server
    POST /v1/score/upload   multipart form: files `videos`, fields `prompts`, in the same order
    GET  /health            200 when it takes requests, else 503; open to all
    GET  /metrics           Prometheus text

Both scoring routes answer {"results": [...], "model": ..., "scale": ...}, in order; `scale` is null for the head's own
rewards. A result is {"reward", "cot", "num_tokens", "is_finished"} or {"error"}, and an error of one video concerns no
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
from serving.bodies import MAX_JSON_MB, Video, limit_body, read_form, read_json
from serving.limits import RETRY_SOON, RefusedError, ServerLimits
from serving.metrics import ServerMetrics
from serving.paths import AllowedRoots, PathError
from serving.scoring_thread import ScoringThread
from verl.data.scored_sequence import judge_problem


@dataclass
class RewardService:
    """What the routes work with. `model_name`: in every answer. `folder`: takes uploads. `token`: None for none.

    `scale`: what rewards are given on, named in every answer.
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
            refused = RefusedError(401, "unauthorized", "give the server's token: `Authorization: Bearer TOKEN`")
            refused.headers["WWW-Authenticate"] = "Bearer"
            raise refused

    async def score_paths(self, request: Request) -> Response:
        """`POST /v1/score`."""
        with self.metrics.request_seconds.labels("paths").time():
            self.scoring.require_room()
            if not self.roots:
                raise RefusedError(403, "no_roots", "the server was started without --roots: upload videos instead")
            request = limit_body(request, min(MAX_JSON_MB, self.limits.max_body_mb))
            async with self._receive():
                asked = await read_json(request)
            self.limits.check_request(len(asked.videos), asked.prompts)
            return await self._score(request, [self._resolve(video.path) for video in asked.videos], asked.prompts)

    async def score_uploads(self, request: Request) -> Response:
        """`POST /v1/score/upload`."""
        with self.metrics.request_seconds.labels("upload").time():
            self.scoring.require_room()
            request = limit_body(request, self.limits.max_body_mb)
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                async with self._receive():
                    videos, prompts = await read_form(request, Path(folder), self.limits)
                return await self._score(request, videos, prompts)

    async def health(self) -> Response:
        """`GET /health`."""
        is_ready = self.scoring.state == "ready"
        return JSONResponse({"status": self.scoring.state}, status_code=200 if is_ready else 503)

    async def read_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

    def interrupt(self) -> None:
        """Refuse what is still on its way: the server stops."""
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def _receive(self) -> AsyncIterator[None]:
        """While a body arrives: so many at a time, and each in its time. Raises RefusedError."""
        if len(self._deadlines) >= self.limits.max_receiving:
            raise RefusedError(503, "too_many_bodies", "too many requests are being received", retry_after=RETRY_SOON)
        seconds = self.limits.body_timeout
        deadline = asyncio.timeout(seconds)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            self.scoring.require_room()
            raise RefusedError(408, "slow_body", f"the body did not arrive within {seconds:g} s") from error
        finally:
            self._deadlines.discard(deadline)

    def _resolve(self, path: str) -> Video | PathError:
        try:
            return Video(self.roots.resolve(path), path)
        except PathError as error:
            return error

    async def _score(self, request: Request, videos: Sequence[Video | PathError], prompts: Sequence[str]) -> Response:
        """Results in order. Raises ClientDisconnect when the client leaves."""
        wanted = [(video, prompt) for video, prompt in zip(videos, prompts, strict=True) if isinstance(video, Video)]
        tasks = [(video.path, judge_problem(prompt)) for video, prompt in wanted]
        outcomes = iter(await self._outcomes(request, tasks))
        results = [
            describe_outcome(next(outcomes), video, self.scale) if isinstance(video, Video) else {"error": str(video)}
            for video in videos
        ]
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


def describe_outcome(outcome: Outcome, video: Video, scale: RewardScale | None = None) -> dict[str, object]:
    """The outcome as JSON, its reward on `scale`, with the client's name of the video in place of ours."""
    if isinstance(outcome, FailedVideo):
        return {"error": outcome.error.replace(video.path, video.name)}
    names = ("cot", "num_tokens", "is_finished")
    reward = outcome.reward if scale is None else scale.apply(outcome.reward)
    return {"reward": reward, **{name: getattr(outcome, name) for name in names}}


def create_app(service: RewardService) -> FastAPI:
    """The application; without pages of documentation, which would load scripts from elsewhere."""
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
