"""The routes of the reward server.

    POST /v1/score          {"videos": [{"path": "/data/a.mp4"}], "prompts": ["a cat runs"]}, paths on the server
    POST /v1/score/upload   multipart form: files `videos`, fields `prompts`, in the same order
    GET  /health            200 when it takes requests, else 503; open to all
    GET  /metrics           Prometheus text

Both scoring routes answer {"results": [...], "model": ..., "scale": ...}, in order; `scale` is null for the head's own
rewards. A result is {"reward", "cot", "num_tokens", "is_finished"} or {"error"}, and an error of one video concerns no
other. Every other answer is {"error"}: 400, 415 and 422 for what is no such request, 404 and 405 for other routes and
methods, 401 without the token, 403 for paths when the server has no roots, 408 and 413 for bodies that are too slow or
too large, 500 when the engine failed, 503 with Retry-After while it cannot take more.
"""

import asyncio
import hmac
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from verl.data.scored_sequence import judge_problem
from verl.inference.scale import RewardScale
from verl.inference.scoring import FailedVideo, Outcome
from verl.serving.limits import MAX_JSON_BYTES, BodyReceiver, RefusedError, ServerLimits
from verl.serving.lingering import LingeringClose
from verl.serving.metrics import ServerMetrics
from verl.serving.paths import AllowedRoots, PathError
from verl.serving.scoring_thread import ScoringThread
from verl.serving.uploads import Upload, UploadParser

GONE = Response(status_code=400)
"""Goes nowhere: the client has left."""


class VideoPath(BaseModel):
    """A video on the server."""

    model_config = ConfigDict(extra="forbid")
    path: str


class ScoreRequest(BaseModel):
    """Body of `/v1/score`."""

    model_config = ConfigDict(extra="forbid")
    videos: list[VideoPath]
    prompts: list[str]


@dataclass(frozen=True)
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
    receiver: BodyReceiver = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "receiver", BodyReceiver(self.limits))

    def require_token(self, request: Request) -> None:
        """Raise RefusedError unless the request carries the token. Compares in constant time."""
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise RefusedError(401, "unauthorized", "give the server's token: `Authorization: Bearer TOKEN`")

    async def score_paths(self, request: Request) -> Response:
        """`POST /v1/score`."""
        with self.metrics.request_seconds.labels("paths").time():
            self.scoring.require_room()
            if not self.roots:
                raise RefusedError(403, "no_roots", "the server was started without --roots: upload videos instead")
            body = bytearray()
            max_bytes = min(MAX_JSON_BYTES, self.limits.max_body_bytes)
            await self.receiver.receive(request, body.extend, max_bytes=max_bytes)
            videos, prompts = _read_json(bytes(body))
            self.limits.check_request(len(videos), prompts)
            return await self._score(request, [self._resolve(path) for path in videos], prompts)

    async def score_uploads(self, request: Request) -> Response:
        """`POST /v1/score/upload`."""
        with self.metrics.request_seconds.labels("upload").time():
            self.scoring.require_room()
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                with UploadParser(request.headers.get("content-type", ""), Path(folder), self.limits) as parser:
                    await self.receiver.receive(request, parser.write, max_bytes=self.limits.max_body_bytes)
                uploads, prompts = parser.finish()
                self.limits.check_request(len(uploads), prompts)
                return await self._score(request, uploads, prompts)

    def health(self) -> Response:
        """`GET /health`."""
        is_ready = self.scoring.state == "ready"
        return JSONResponse({"status": self.scoring.state}, status_code=200 if is_ready else 503)

    def read_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

    def _resolve(self, path: str) -> Upload | PathError:
        try:
            return Upload(self.roots.resolve(path), path)
        except PathError as error:
            return error

    async def _score(self, request: Request, videos: Sequence[Upload | PathError], prompts: Sequence[str]) -> Response:
        """Results in order; videos not started yet are dropped when the client leaves."""
        wanted = [(video, prompt) for video, prompt in zip(videos, prompts, strict=True) if isinstance(video, Upload)]
        outcomes = await self._outcomes(request, [(video.path, judge_problem(prompt)) for video, prompt in wanted])
        if outcomes is None:
            return GONE
        of_wanted = iter(outcomes)
        results = [
            describe_outcome(next(of_wanted), video, self.scale)
            if isinstance(video, Upload)
            else {"error": str(video)}
            for video in videos
        ]
        scale = None if self.scale is None else asdict(self.scale)
        return JSONResponse({"results": results, "model": self.model_name, "scale": scale})

    async def _outcomes(self, request: Request, tasks: Sequence[tuple[str, str]]) -> list[Outcome] | None:
        """None when the client has left; even then, what had been started is finished, and reads no file any more."""
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
            return None
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes


def describe_outcome(outcome: Outcome, video: Upload, scale: RewardScale | None = None) -> dict[str, object]:
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
    app.add_middleware(LingeringClose)

    @app.exception_handler(RefusedError)
    def refuse(request: Request, refused: RefusedError) -> Response:
        service.metrics.refused.labels(refused.reason).inc()
        headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after is not None else {}
        if refused.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)

    @app.exception_handler(HTTPException)
    def refuse_route(request: Request, error: HTTPException) -> Response:
        service.metrics.refused.labels("invalid").inc()
        message = f"{request.method} {request.url.path[:200]}: {error.detail}; see POST /v1/score and /v1/score/upload"
        return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def refuse_parameters(request: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(str(problem["msg"]) for problem in error.errors())
        return refuse(request, RefusedError(422, "invalid", f"the request has wrong parameters: {problems}"))

    @app.exception_handler(ClientDisconnect)
    def leave(request: Request, _: ClientDisconnect) -> Response:
        return GONE

    return app


def _read_json(body: bytes) -> tuple[list[str], list[str]]:
    try:
        parsed = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RefusedError(422, "invalid", f"the body is no request to score: {place}: {first['msg']}") from error
    return [video.path for video in parsed.videos], parsed.prompts
