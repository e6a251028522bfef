"""The routes of the reward server.

    POST /v1/score          {"videos": [{"path": "/data/a.mp4"}], "prompts": ["a cat runs"]}, paths on the server
    POST /v1/score/upload   multipart form: files `videos`, fields `prompts`, in the same order
    POST /flow_grpo         these are Flow-GRPO's and
    POST /score             UniRL's protocols: see protocols.py
    GET  /health            200 when it takes requests, else 503; open to all
    GET  /metrics           Prometheus text
    GET  /                  a page to try the model; open to all

`?run=NAME` behind a scoring route says for which of a client's runs it scores; scoring/watch.py watches each.

The first two answer {"results": [...], "model": ..., "scale": ...}, in order; `scale` is null for the head's own
rewards. A result is {"reward", "cot", "num_tokens", "is_finished"} or {"error"}; an error of one video concerns no
other. With `?num_thoughts=8` behind any scoring route a reward is the mean over 8 drawn thoughts, and these results
also have "standard_error" and "thoughts", a list of such results; serve.py --num_thoughts is the default. Every other
answer is {"error"}: 400, 415 and 422 for an invalid request, 404 and 405 for other routes and methods, 401 without the
token, 403 for paths when the server has no roots, 408 and 413 for bodies that are too slow or too large, 500 when the
engine failed, 503 with Retry-After while it cannot take more.
"""

import asyncio
import base64
import contextlib
import hmac
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from scoring.source import RewardScale, apply_scale_to_video
from scoring.types import FailedVideo, Outcome
from scoring.watch import RunWatch
from serving.metrics import ServerMetrics
from serving.protocols import REWARD_NAME, FrameSampler, UnirlRequest, read_flow_grpo, write_flow_grpo
from serving.requests import (
    MAX_JSON_MB,
    RETRY_SOON,
    AllowedRoots,
    ServerLimits,
    Video,
    limit_body,
    read_form,
    read_json,
    read_num_thoughts,
    refuse,
)
from serving.scoring_thread import ScoringThread
from verl.data.scored_sequence import judge_problem
from verl.data.vision_process import VideoFrames

Answer = dict[str, object]
PAGE = Path(__file__).with_name("try_page.html")
UNFRAMED = {"Content-Security-Policy": "frame-ancestors 'none'"}  # which the page itself cannot say
MAX_RUN_CHARS = 64


@dataclass
class RewardService:
    """What the routes work with. `model_name`: in every answer. `folder`: takes uploads. `token`: None for none.

    `sample`: makes VideoFrames of frames. `scale`: on which rewards are given, named in every answer; None for the
    head's own. `mask_cot`: no video thinks. `count_engines`: how many run while the server is ready, which may block;
    None for one.
    """

    scoring: ScoringThread
    model_name: str
    folder: Path
    roots: AllowedRoots
    limits: ServerLimits
    metrics: ServerMetrics
    sample: FrameSampler
    token: str | None = None
    scale: RewardScale | None = None
    mask_cot: bool = False
    watch: RunWatch = field(default_factory=RunWatch)
    count_engines: Callable[[], int] | None = None
    _deadlines: set[asyncio.Timeout] = field(default_factory=set, init=False)

    async def require_token(self, request: Request) -> None:
        """Raise HTTPException unless the request carries the token. Compares in constant time."""
        if self.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        given, kind = given.strip().encode(), kind.lower()
        if kind == "basic":  # http://user:TOKEN@host, for clients that know no tokens
            with contextlib.suppress(ValueError):
                kind, given = "bearer", base64.b64decode(given).partition(b":")[2]
        if kind != "bearer" or not hmac.compare_digest(given, self.token.encode()):
            message = "give the server's token: `Authorization: Bearer TOKEN`"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    async def score_paths(self, request: Request) -> Answer:
        """`POST /v1/score`."""
        with self.metrics.request_seconds.labels("paths").time():
            self.scoring.require_room()
            if not self.roots.roots:
                raise refuse(403, "the server was started without --roots: upload videos instead")
            request = limit_body(request, min(MAX_JSON_MB, self.limits.max_body_mb))
            async with self._receive():
                paths, prompts = await read_json(request, self.limits)
            videos = [self.roots.find(path) or f"no file below the server's --roots: {path}" for path in paths]
            return await self._score(request, videos, prompts)

    async def score_uploads(self, request: Request) -> Answer:
        """`POST /v1/score/upload`."""
        with self.metrics.request_seconds.labels("upload").time():
            self.scoring.require_room()
            request = limit_body(request, self.limits.max_body_mb)
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                async with self._receive():
                    videos, prompts = await read_form(request, self.limits, Path(folder))
                return await self._score(request, videos, prompts)

    async def score_flow_grpo(self, request: Request) -> Response:
        """`POST /flow_grpo`."""
        with self.metrics.request_seconds.labels("flow_grpo").time():
            request, body = await self._read(request)
            videos, prompts = await run_in_threadpool(read_flow_grpo, body, self.limits, self.sample)
            del body  # not to be kept while the videos wait
            answer = await self._score(request, videos, prompts)
            return Response(write_flow_grpo(answer["results"]), media_type="application/octet-stream")

    async def score_unirl(self, request: Request) -> Answer:
        """`POST /score`."""
        with self.metrics.request_seconds.labels("unirl").time():
            request, body = await self._read(request)
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                asked = await run_in_threadpool(UnirlRequest, body, self.limits, self.roots, Path(folder))
                del body
                return asked.write((await self._score(request, asked.videos, asked.prompts))["results"])

    async def _read(self, request: Request) -> tuple[Request, bytes]:
        """The request, limited, and its body. Raises HTTPException."""
        self.scoring.require_room()
        request = limit_body(request, self.limits.max_body_mb)
        async with self._receive():
            return request, b"".join([chunk async for chunk in request.stream()])  # body() would keep it

    async def health(self, response: Response) -> Answer:
        """`GET /health`."""
        state = self.scoring.state
        num_engines = await run_in_threadpool(self._count_ready)
        response.status_code = 200 if num_engines else 503
        return {"status": state, "engines": num_engines, "rewards": {REWARD_NAME: ["ready"] * num_engines}}

    async def read_metrics(self) -> Response:
        """`GET /metrics`."""
        self.metrics.show_runs(self.watch.read())
        self.metrics.engines.set(await run_in_threadpool(self._count_ready))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _count_ready(self) -> int:
        if self.scoring.state != "ready":
            return 0
        return 1 if self.count_engines is None else self.count_engines()

    def interrupt(self) -> None:
        """Refuse the bodies that are still arriving: the server stops."""
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def _receive(self) -> AsyncIterator[None]:
        """While a body arrives: limits their number and the time of each. Raises HTTPException."""
        if len(self._deadlines) >= self.limits.max_receiving:
            raise refuse(503, "too many requests are being received", retry_after=RETRY_SOON)
        seconds = self.limits.body_timeout
        deadline = asyncio.timeout(seconds)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            self.scoring.require_room()  # refuses with 503 where the deadline was moved because the server stops
            raise refuse(408, f"the body did not arrive within {seconds:g} s") from error
        finally:
            self._deadlines.discard(deadline)

    async def _score(self, request: Request, videos: Sequence[Video | str], prompts: Sequence[str]) -> Answer:
        """Results in order; a string in place of a video is its error. Raises ClientDisconnect."""
        pairs = zip(videos, prompts, strict=True)
        number = read_num_thoughts(request, self.limits)
        if self.mask_cot and number is not None:
            raise refuse(422, "the server scores without thoughts (--mask_cot): leave out num_thoughts")
        tasks = [(video.source, judge_problem(prompt), number) for video, prompt in pairs if isinstance(video, Video)]
        outcomes = iter(await self._outcomes(request, tasks))
        results = [
            self._describe(next(outcomes), video) if isinstance(video, Video) else {"error": video} for video in videos
        ]
        return {"results": results, "model": self.model_name, "scale": self.scale and asdict(self.scale)}

    async def _outcomes(
        self, request: Request, tasks: Sequence[tuple[str | VideoFrames, str, int | None]]
    ) -> list[Outcome]:
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
        run = ascii((request.query_params.get("run") or "default")[:MAX_RUN_CHARS])[1:-1]  # breaks no line of a log
        self.watch.add(run, outcomes)
        return outcomes

    def _describe(self, outcome: Outcome, video: Video) -> Answer:
        """The outcome as JSON, its reward on `scale`, with the client's name for the video in place of our path."""
        if isinstance(outcome, FailedVideo):
            ours = video.source if isinstance(video.source, str) else "frames in memory"
            return {"error": outcome.error.replace(ours, video.name)}
        described = asdict(apply_scale_to_video(outcome, self.scale))
        hidden = ("name",) if outcome.thoughts else ("name", "standard_error", "thoughts")
        return {name: value for name, value in described.items() if name not in hidden}


def create_app(service: RewardService) -> FastAPI:
    """The application; without pages of documentation, which would load scripts from other sites."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guarded = [Depends(service.require_token)]
    app.add_api_route("/v1/score", service.score_paths, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/score/upload", service.score_uploads, methods=["POST"], dependencies=guarded)
    app.add_api_route("/flow_grpo", service.score_flow_grpo, methods=["POST"], dependencies=guarded)
    app.add_api_route("/score", service.score_unirl, methods=["POST"], dependencies=guarded)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/", lambda: FileResponse(PAGE, headers=UNFRAMED), methods=["GET"])
    app.add_api_route("/metrics", service.read_metrics, methods=["GET"], dependencies=guarded)

    @app.exception_handler(HTTPException)
    async def answer_refusal(request: Request, error: HTTPException) -> Response:
        service.metrics.refused.labels(error.status_code).inc()
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def leave(request: Request, _: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody

    return app
