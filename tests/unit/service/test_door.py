"""The two ways of a predict call say the same, answers belong to their requests, and who comes in vain is told so at the door."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Message

from service.protocol import UNREAD
from tests.support import MULTIPART, Client, Headers, assert_problem, form, make_service, part, png, serving

PREDICT = "/v1/guards/cifar/predict"
PNG = [("Content-Type", "image/png")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("data"))) as found:
        yield found


@pytest.mark.parametrize(
    ("target", "headers", "body"),
    [
        pytest.param(PREDICT, PNG, png(), id="an image"),
        pytest.param(PREDICT, [("Content-Type", MULTIPART)], form(part("image", png())), id="an image in a form"),
        pytest.param(PREDICT, [*PNG, ("X-Request-Id", "a-number-of-mine")], png(), id="a request id"),
        pytest.param(PREDICT, PNG, b"", id="no image"),
        pytest.param(PREDICT, PNG, b"no image", id="what is no image"),
        pytest.param(PREDICT, [("Content-Type", "text/plain")], png(), id="another type"),
        pytest.param(PREDICT, [*PNG, ("X-Deadline-Ms", "soon")], png(), id="no deadline"),
        pytest.param(PREDICT, [*PNG, ("X-Deadline-Ms", "0")], png(), id="a deadline that has passed"),
        pytest.param("/v1/guards/none/predict", PNG, png(), id="no such guard"),
        pytest.param("/v1/guards/%2e%2e/predict", PNG, png(), id="no name of a guard"),
    ],
)
def test_the_short_way_answers_as_the_long_one(client: Client, target: str, headers: Headers, body: bytes) -> None:
    short, long = client("POST", target, headers, body), client("POST", f"{target}?explain=false", headers, body)
    mine, other = short.json(), long.json()
    assert short.status_code == long.status_code
    assert mine.pop("request_id") == short.headers["x-request-id"]
    other.pop("request_id")
    assert mine == other
    assert set(short.headers) == set(long.headers)


def test_both_ways_are_counted_under_the_route(client: Client) -> None:
    before = counted(client, "200")
    client.predict(png())
    client("POST", f"{PREDICT}?explain=false", PNG, png())
    assert counted(client, "200") == before + 2


def counted(client: Client, status: str) -> float:
    labels = {"method": "POST", "route": "/v1/guards/{guard}/predict", "status": status}
    return client.service.metrics.registry.get_sample_value("badexpert_http_requests_total", labels) or 0.0


def test_a_token_is_asked_for_on_the_short_way_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(make_service(tmp_path_factory.mktemp("data"), predict_token="predict-secret", admin_token="admin-secret")) as guarded:
        assert_problem(guarded("POST", PREDICT, PNG, png()), 401, "unauthenticated")
        assert guarded("POST", PREDICT, [*PNG, ("Authorization", "Bearer predict-secret")], png()).status_code == 200


def test_answers_belong_to_their_requests_however_many_come_at_once(client: Client) -> None:
    images = [png(seed=seed) for seed in range(60)]
    alone = [score(client("POST", f"{PREDICT}?explain=true", PNG, image)) for image in images]

    async def crowd() -> list[httpx.Response]:
        return list(await asyncio.gather(*(client.call("POST", f"{PREDICT}?explain=true", PNG, image) for image in images)))

    together = [score(response) for response in client.runner.run(crowd())]
    assert together == pytest.approx(alone, rel=1e-5)
    assert len({round(each, 4) for each in alone}) > 50  # or it would say nothing


def score(response: httpx.Response) -> float:
    assert response.status_code == 200, response.text
    return float(response.json()["explanation"]["score"])


def test_who_would_be_answered_too_late_is_refused_before_anything_is_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(client.service.judge.traffic), "seconds_ahead", 2.0)
    before = counted(client, "429")
    refused = client("POST", PREDICT, [*PNG, ("X-Deadline-Ms", "1000"), ("X-Request-Id", "a-number-of-mine")], b"never read")
    assert assert_problem(refused, 429, "overloaded")["request_id"] == "a-number-of-mine"
    assert_problem(client("POST", f"{PREDICT}-batch", [("Content-Type", MULTIPART), ("X-Deadline-Ms", "1000")], b"never read"), 429, "overloaded")
    assert counted(client, "429") == before + 1
    assert client.predict(png()).status_code == 200  # who has ten seconds is served
    assert client("GET", "/v1/guards", [("X-Deadline-Ms", "1000")]).status_code == 200


@pytest.mark.parametrize(
    ("method", "url", "comes_in"),
    [
        (b"POST", b"/v1/guards/cifar/predict", False),
        (b"POST", b"/v1/guards/cifar/predict-batch", False),
        (b"GET", b"/v1/guards/cifar/predict", True),
        (b"POST", b"/v1/guards/cifar/predict?explain=true", True),
        (b"POST", b"/v1/guards/ci%66ar/predict", True),
        (b"POST", b"/v1/guards/a/b/predict", True),
        (b"POST", b"/v1/calibrations", True),
        (b"POST", b"http://a/v1/guards/cifar/predict", True),
    ],
)  # fmt: skip
def test_a_protocol_is_told_what_the_door_would_say(client: Client, monkeypatch: pytest.MonkeyPatch, method: bytes, url: bytes, comes_in: bool) -> None:
    door, headers = client.service.app, [(b"x-deadline-ms", b"1000"), (b"x-request-id", b"a-number-of-mine")]
    assert door.refusal(method, url, headers, 0.1) is None
    assert (door.refusal(method, url, headers, 1.1) is None) is comes_in  # its deadline passed before it was read
    monkeypatch.setattr(type(client.service.judge.traffic), "seconds_ahead", 2.0)
    refusal = door.refusal(method, url, headers, 0.0)
    assert (refusal is None) is comes_in
    if refusal is not None:
        asked = client("POST", url.decode(), [("X-Deadline-Ms", "1000"), ("X-Request-Id", "a-number-of-mine")], b"never read")
        assert asked.status_code == 429
        assert asked.content == refusal[1]
        assert [*asked.headers.raw] == [*refusal[0]]


def test_what_lay_unread_until_its_deadline_is_refused_as_an_application_too(client: Client) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("its body is not read")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"x-deadline-ms", b"1000")]
    scope = {"type": "http", "method": "POST", "path": PREDICT, "headers": headers, "extensions": {UNREAD: {"seconds": 1.1}}}
    client.runner.run(client.service.app(scope, receive, send))
    assert sent[0]["status"] == 429
