"""Around every request: an id, a count and a time, a refusal while draining, and a problem body for whatever went wrong unforeseen.

And before all that, in as few steps as will do, a refusal of images whose answer would come too late: in a storm, each that took longer to refuse would take
its time from those that can still be judged.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, field

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import Problem
from service.errors import Draining, Overloaded, render
from service.metrics import Metrics
from service.protocol import UNREAD, Headers, Refusal
from service.traffic import Traffic

log = structlog.get_logger()
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}", re.ASCII)
_PREDICT = re.compile(r"/v1/guards/(?P<guard>[^/]+)/(?P<call>predict|predict-batch)")
_PREDICT_URL = re.compile(rb"/v1/guards/[^/?#%]+/(predict|predict-batch)")
_PLACE = "the-request-id"
NO_WAIT = {"seconds": 0.0}


@dataclass
class Health:
    """Whether the process should get traffic."""

    started: bool = False
    draining: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)  # guards whose active version could not be loaded, and why


def request_id_of(headers: Headers) -> str:
    """The caller's own, where it is one, or a new one: no secret, and the kernel's randomness would cost a wait for the interpreter's lock."""
    given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class Door:
    """Around the whole app: refuses images where there is too much traffic, and has the usual predict call answered by `direct`."""

    def __init__(self, app: ASGIApp, direct: ASGIApp, metrics: Metrics, traffic: Traffic) -> None:
        self._app, self._direct, self._traffic = app, direct, traffic
        self._count = {name: metrics.requests.labels("POST", f"/v1/guards/{{guard}}/{name.decode()}", "429") for name in (b"predict", b"predict-batch")}
        self._route = Route("/v1/guards/{guard}/predict", direct)  # for those who ask the scope which one it was
        refusal = render(Overloaded(), _PLACE)
        self._body, self._headers = bytes(refusal.body), [header for header in refusal.raw_headers if header[0] not in (b"x-request-id", b"content-length")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        predicts = _PREDICT.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if predicts is None:
            await self._app(scope, receive, send)
        elif self._traffic.hopeless(scope["headers"], scope.get("extensions", {}).get(UNREAD, NO_WAIT)["seconds"]):
            headers, body = self._refuse(predicts["call"].encode(), scope["headers"])
            await send({"type": "http.response.start", "status": 429, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        elif predicts["call"] == "predict" and not scope["query_string"]:
            scope["path_params"], scope["route"] = {"guard": predicts["guard"]}, self._route
            await self._direct(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def refusal(self, method: bytes, url: bytes, headers: Headers, waited: float) -> Refusal | None:
        """Of a request whose head has just been read, for a protocol that can answer it without a scope and a task; None where it is to come in.

        waited: for how many seconds the head was here, unread.
        """
        predicts = _PREDICT_URL.fullmatch(url) if method == b"POST" else None
        return None if predicts is None or not self._traffic.hopeless(headers, waited) else self._refuse(predicts[1], headers)

    def _refuse(self, call: bytes, headers: Headers) -> Refusal:
        request_id = request_id_of(headers).encode()
        body = self._body.replace(_PLACE.encode(), request_id)
        own = [(b"content-length", b"%d" % len(body)), (b"x-request-id", request_id), (b"x-content-type-options", b"nosniff")]
        self._count[call].inc()
        return [*self._headers, *own], body


class Envelope:
    """Around the routes."""

    def __init__(self, app: ASGIApp, metrics: Metrics, health: Health) -> None:
        self._app, self._metrics, self._health = app, metrics, health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        request = Request(scope)
        request_id = request_id_of(scope["headers"])
        request.state.request_id = request_id

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            if self._health.draining and scope["path"] not in ("/livez", "/readyz", "/metrics"):
                raise Draining
            await self._app(scope, receive, numbered)
        except ClientDisconnect:
            status = status or 499  # nobody is there to be answered; the number is nginx's
        except Exception as error:
            problem = error if isinstance(error, Problem) else Problem()
            if not isinstance(error, Problem):
                log.exception("unforeseen", request_id=request_id)
            if status == 0:
                await render(problem, request_id)(scope, receive, numbered)
        finally:
            # The template of the route, never the path: a label that callers choose would grow without bound.
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.perf_counter() - began
            self._metrics.requests.labels(method, route, str(status or 500)).inc()
            self._metrics.request_seconds.labels(method, route).observe(seconds)
