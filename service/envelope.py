"""Around every request: an id, a count and a time, a refusal while draining, and a problem body for whatever went wrong unforeseen."""

from __future__ import annotations

import asyncio
import random
import re
import time

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import Problem
from service.errors import Draining, render
from service.health import Health
from service.metrics import Metrics
from service.protocol import Headers

log = structlog.get_logger()
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}", re.ASCII)


def request_id_of(headers: Headers) -> str:
    """The caller's own, where it is one, or a new one: no secret, and the kernel's randomness would cost a wait for the interpreter's lock."""
    given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


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
        except asyncio.CancelledError:
            if not self._health.draining:
                raise
            # The time for the drain is over. It goes no further: around this there is nothing to cancel, and uvicorn would log a trace.
            if status == 0:
                await render(Draining(), request_id)(scope, receive, numbered)
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
