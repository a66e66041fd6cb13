"""Before the whole app, in as few steps as will do: a refusal of images whose answer would come too late, and the short way for the usual predict call.

In a storm, each image that took longer to refuse would take its time from those that can still be judged.
"""

from __future__ import annotations

import re

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service.envelope import request_id_of
from service.errors import Overloaded, render
from service.metrics import Metrics
from service.protocol import UNREAD, Headers, Refusal
from service.traffic import Traffic

_PREDICT = re.compile(r"/v1/guards/(?P<guard>[^/]+)/(?P<call>predict|predict-batch)")
_PREDICT_URL = re.compile(rb"/v1/guards/[^/?#%]+/(predict|predict-batch)")
_PLACE = "the-request-id"
NO_WAIT = {"seconds": 0.0}


class Door:
    """Refuses images where there is too much traffic, has the usual predict call answered by `direct`, and leaves all else to the app."""

    def __init__(self, app: ASGIApp, direct: ASGIApp, metrics: Metrics, traffic: Traffic) -> None:
        self._app, self._direct, self._traffic = app, direct, traffic
        self._count = {name: metrics.requests.labels("POST", f"/v1/guards/{{guard}}/{name.decode()}", "429") for name in (b"predict", b"predict-batch")}
        self._route = Route("/v1/guards/{guard}/predict", direct)  # what is asked for scope["route"], as the count of requests does, finds it there
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
