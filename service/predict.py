"""The calls of the predict scope: judge images, and tell what guards there are.

Fail closed: a prediction leaves only with a finite score, and everything in an answer comes from the one bundle that the row was prepared for.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from models.errors import NotFound, Problem, ScoreNotFinite
from service.auth import Authenticator
from service.batcher import Batcher
from service.caller import Caller, caller_of
from service.engine import Engine, LiveGuard, Outcome
from service.errors import DeadlineInvalid, Forbidden, NoActiveBundle
from service.images import Images
from service.metrics import MOST_CLASSES, Metrics
from service.traffic import Traffic
from service.views import GuardList, GuardView, GuardViews

log = structlog.get_logger()
ImageBatcher = Batcher[LiveGuard, Tensor, Outcome]
_MILLISECONDS = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class Prediction(BaseModel):
    """What the suspect says."""

    label: int = Field(description="class index")
    class_name: str
    confidence: float = Field(description="the suspect's softmax of this class")


class Explanation(BaseModel):
    """Why: an oracle for an attacker, so only for callers of the admin scope who ask for it."""

    score: float = Field(description="small is suspicious: below the threshold the image is rejected")
    threshold: float
    expert_confidence: float | None = Field(description="null (preset paper): what the auxiliary says suffices to accept the image")
    auxiliary_confidence: float | None = Field(description="null (preset auto): the suspect's features and the experts spoke clearly enough for a clean image")
    would_be: Prediction = Field(description="what the suspect says, whatever the verdict")


class Verdict(BaseModel):
    """The answer to one image. `prediction` is null for a rejected image, so that a client that looks only there fails safe."""

    verdict: Literal["accepted", "rejected"]
    prediction: Prediction | None
    guard: str
    version: int
    bundle_id: str
    mode: Literal["enforce", "shadow"] = Field(description="in shadow mode rejected images keep their prediction")
    request_id: str
    explanation: Explanation | None = None


class BatchItemProblem(BaseModel):
    """An image of a batch that could not be judged; the others are not affected."""

    status: int
    code: str
    title: str
    detail: str


class BatchItem(BaseModel):
    """One image of a batch: exactly one of the two is there."""

    result: Verdict | None = None
    problem: BatchItemProblem | None = None


class BatchVerdicts(BaseModel):
    """The answers to a batch, in the order of its images."""

    items: list[BatchItem]


@dataclass(frozen=True)
class Judge:
    """From bytes to a verdict."""

    engine: Engine
    images: Images
    batcher: ImageBatcher
    metrics: Metrics
    deadline_seconds: float
    traffic: Traffic
    authenticator: Authenticator

    def authorise(self, request: Request, explain: bool) -> None:
        """Raises Unauthenticated, or Forbidden."""
        scopes = self.authenticator.require(request, "predict")
        if explain and "admin" not in scopes:
            raise Forbidden("Scores are shown to the admin scope only: they would be an oracle for an attacker.")

    async def answer(self, request: Request, guard: str, explain: bool) -> Response:
        """To a request with one image."""
        self.authorise(request, explain)
        live, deadline = self.live(guard), self.deadline(request)
        with self.images.budget.hold() as hold:
            data = await self.images.one(request, hold)
            verdict = await self.judge(live, data, deadline, request.state.request_id, explain, caller_of(request.scope), alone=True)
        return Response(verdict.model_dump_json(), media_type="application/json")  # FastAPI would validate it once more

    def live(self, guard: str) -> LiveGuard:
        """The guard as it is being served now. Raises NotFound or NoActiveBundle."""
        live = self.engine.live(guard)
        if live is None:
            raise NoActiveBundle if self.engine.registry.versions(guard) else NotFound("There is no such guard.")
        return live

    def deadline(self, request: Request) -> float:
        """The request's deadline by the event loop's clock."""
        seconds = self.deadline_seconds
        wanted = request.headers.get("x-deadline-ms")
        if wanted is not None:
            if not _MILLISECONDS.fullmatch(wanted):
                raise DeadlineInvalid
            seconds = min(seconds, int(wanted) / 1000)
        return asyncio.get_running_loop().time() + seconds

    async def judge(self, live: LiveGuard, data: bytes, deadline: float, request_id: str, explain: bool, caller: Caller, *, alone: bool) -> Verdict:
        """Raises a Problem wherever no complete, finite judgement was reached in time, or ClientDisconnect. Counts the image by what becomes of it."""
        try:
            with self.traffic.judging():
                began = time.perf_counter()
                pixels = await self.images.pixels(data, live.description.preprocessing, deadline, alone=alone)
                self.metrics.decode_seconds.observe(time.perf_counter() - began)
                outcome = await self.batcher.submit(live, pixels, deadline, caller)
            if not (math.isfinite(outcome.score) and math.isfinite(outcome.confidence)):
                raise ScoreNotFinite
            verdict = self._verdict(live, outcome, request_id, explain)
        except ClientDisconnect:
            self.metrics.count_image("abandoned")
            raise
        except Exception as error:
            self.metrics.count_image(error.code if isinstance(error, Problem) else Problem.code)
            raise
        self.metrics.count_image(verdict.verdict)
        return verdict

    async def several(self, request: Request, guard: str, explain: bool) -> BatchVerdicts:
        """The answers to a request with several images. One that fails leaves the others as they are."""
        self.authorise(request, explain)
        live, deadline, request_id, caller = self.live(guard), self.deadline(request), request.state.request_id, caller_of(request.scope)

        async def item(data: bytes) -> BatchItem:
            try:
                return BatchItem(result=await self.judge(live, data, deadline, request_id, explain, caller, alone=False))
            except Problem as problem:
                return _unjudged(problem)
            except ClientDisconnect:
                raise
            except Exception:
                log.exception("unforeseen", request_id=request_id)
                return _unjudged(Problem())

        with self.images.budget.hold() as hold:
            items = list(await asyncio.gather(*map(item, await self.images.several(request, hold))))
        failed = Counter(item.problem.code for item in items if item.problem is not None and item.problem.status >= 500)
        for code, images in failed.items():  # a line each, and not one for every image
            log.warning("request_failed", request_id=request_id, code=code, images=images)
        return BatchVerdicts(items=items)

    def _verdict(self, live: LiveGuard, outcome: Outcome, request_id: str, explain: bool) -> Verdict:
        description = live.description
        verdict: Literal["accepted", "rejected"] = "rejected" if outcome.rejected else "accepted"
        self.metrics.verdicts.labels(live.name, verdict).inc()
        self.metrics.score.labels(live.name).observe(outcome.score - live.threshold.value)
        if outcome.rejected:
            self.metrics.rejections.labels(live.name, str(outcome.label) if outcome.label < MOST_CLASSES else "other").inc()
        prediction = Prediction(label=outcome.label, class_name=description.class_names[outcome.label], confidence=outcome.confidence)
        explanation = Explanation(
            score=outcome.score,
            threshold=live.threshold.value,
            expert_confidence=outcome.expert,
            auxiliary_confidence=outcome.auxiliary,
            would_be=prediction,
        )
        return Verdict(
            verdict=verdict,
            prediction=prediction if verdict == "accepted" or live.mode == "shadow" else None,
            guard=live.name,
            version=live.version,
            bundle_id=live.bundle_id,
            mode=live.mode,
            request_id=request_id,
            explanation=explanation if explain else None,
        )


def _unjudged(problem: Problem) -> BatchItem:
    return BatchItem(problem=BatchItemProblem(status=problem.status, code=problem.code, title=problem.title, detail=problem.detail))


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/png": _IMAGE,
            "image/jpeg": _IMAGE,
            "image/webp": _IMAGE,
            "multipart/form-data": {"schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}, "required": ["image"]}},
        },
    }
}
_BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["image"],
                }
            }
        },
    }
}
Explain = Annotated[bool, Query(description="add score and confidences; admin scope")]


def direct(judge: Judge, on_problem: Callable[[Request, Problem], Awaitable[Response]]) -> ASGIApp:
    """The predict call without a query, past routing and middleware, which would take longer than all else that the event loop does for it.

    Reads the guard's name from the scope's path parameters.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            response = await judge.answer(request, scope["path_params"]["guard"], explain=False)
        except Problem as problem:
            response = await on_problem(request, problem)
        await response(scope, receive, send)

    return app


def router(judge: Judge, views: GuardViews) -> APIRouter:
    """The routes of the predict scope."""
    routes = APIRouter(prefix="/v1/guards", tags=["predict"])

    @routes.post("/{guard}/predict", openapi_extra=_BODY, response_model=Verdict)
    async def predict(request: Request, guard: str, explain: Explain = False) -> Response:
        """Judge one image: the body itself, or a multipart part named `image`."""
        return await judge.answer(request, guard, explain)

    @routes.post("/{guard}/predict-batch", openapi_extra=_BATCH_BODY)
    async def predict_batch(request: Request, guard: str, explain: Explain = False) -> BatchVerdicts:
        """Judge several images, a verdict or a problem each, in order. All are judged by the same bundle."""
        return await judge.several(request, guard, explain)

    @routes.get("")
    async def guards(request: Request) -> GuardList:
        """All guards, their versions, and what each promises."""
        judge.authenticator.require(request, "predict")
        return GuardList(guards=await asyncio.to_thread(views.all))

    @routes.get("/{guard}")
    async def guard(request: Request, guard: str) -> GuardView:
        """One guard, its versions, and what each promises."""
        judge.authenticator.require(request, "predict")
        return await asyncio.to_thread(views.one, guard)

    return routes
