"""What becomes of a request that is cancelled, as all are that outlast the drain."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.envelope import Envelope
from service.metrics import Metrics

SCOPE = {"type": "http", "method": "POST", "path": "/v1/calibrations", "headers": [(b"x-request-id", b"of-the-caller")]}
START = {"type": "http.response.start", "status": 200, "headers": []}


async def cancelled(draining: bool, begins: bool) -> tuple[list[Any], str]:
    """What such a request is sent, and what is counted."""
    sent: list[Any] = []
    health, metrics, running = SimpleNamespace(draining=False), Metrics(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begins:
            await send(START)
        running.set()
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    envelope = Envelope(app, metrics, cast(Any, health))
    task = asyncio.ensure_future(envelope(dict(SCOPE), cast(Any, None), send))
    await running.wait()
    health.draining = draining
    task.cancel()
    await task
    return sent, metrics.render().decode()


def test_p10_a_request_that_outlasts_the_drain_is_answered_that_the_server_shuts_down() -> None:
    (start, body), counted = asyncio.run(cancelled(draining=True, begins=False))
    assert start["status"] == 503
    headers = dict(start["headers"])
    assert (headers[b"content-type"], headers[b"x-request-id"]) == (b"application/problem+json", b"of-the-caller")
    assert json.loads(body["body"])["code"] == "draining"
    assert 'badexpert_http_requests_total{method="POST",route="unmatched",status="503"} 1.0' in counted


def test_an_answer_that_has_begun_gets_no_second_one() -> None:
    (start,), _ = asyncio.run(cancelled(draining=True, begins=True))
    assert start["status"] == 200


def test_any_other_cancellation_goes_on() -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled(draining=False, begins=False))
