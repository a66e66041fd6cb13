"""Rows F1 to F10 of the abuse catalogue: who may call what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.abuse.calls import ACTIVE, GUARD, PREDICT, TOKENS, UPLOAD, bearer, row, unread
from tests.support import MULTIPART, Client, Headers, assert_problem, make_service, png, serving


@pytest.fixture(scope="module")
def module_guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("guarded"), **TOKENS)) as client:
        yield client


@pytest.fixture
def guarded(module_guarded: Client) -> Client:
    module_guarded.service.authenticator._wrong.clear()  # each test has its own guesses
    return module_guarded


CALLS = [
    row("predict", "POST", PREDICT, "predict"),
    row("predict-batch", "POST", PREDICT + "-batch", "predict"),
    row("guards", "GET", "/v1/guards", "predict"),
    row("a guard", "GET", GUARD, "predict"),
    row("activate", "PUT", ACTIVE, "admin"),
    row("deactivate", "DELETE", "/v1/guards/other/active", "admin"),
    row("change", "PATCH", GUARD, "admin"),
    row("remove", "DELETE", GUARD + "/versions/9", "admin"),
    row("upload", "POST", UPLOAD, "admin"),
    row("inspection", "POST", "/v1/inspections", "admin"),
    row("calibrations", "GET", UPLOAD, "admin"),
    row("a calibration", "GET", UPLOAD + "/x", "admin"),
    row("events", "GET", UPLOAD + "/x/events", "admin"),
    row("report", "GET", UPLOAD + "/x/report", "admin"),
    row("cancel", "DELETE", UPLOAD + "/x", "admin"),
    row("metrics", "GET", "/metrics", "metrics"),
]


@pytest.mark.parametrize(("method", "target", "scope"), CALLS)
def test_every_call_needs_its_scope(guarded: Client, method: str, target: str, scope: str) -> None:
    assert_problem(guarded(method, target, (), b"x", on_receive=unread), 401, "unauthenticated")
    assert_problem(guarded(method, target, [bearer("wrong-guess")], b"x", on_receive=unread), 401, "unauthenticated")
    for other in {"predict", "metrics"} - {scope}:
        assert_problem(guarded(method, target, [bearer(f"{other}-secret")], b"x", on_receive=unread), 403, "forbidden")
    for enough in {scope, "admin"}:
        assert guarded(method, target, [bearer(f"{enough}-secret")], b"x").status_code not in (401, 403, 500)


def test_every_route_is_in_the_table_above(guarded: Client) -> None:
    documented = {(method.upper(), path) for path, methods in guarded("GET", "/openapi.json").json()["paths"].items() for method in methods}
    named = {
        "/v1/guards/cifar": "/v1/guards/{guard}",
        "/v1/guards/other": "/v1/guards/{guard}",
        "/calibrations/x": "/calibrations/{calibration}",
        "/versions/9": "/versions/{version}",
    }
    listed = set()
    for call in CALLS:
        method, target, _ = call.values
        for example, template in named.items():
            target = target.replace(example, template)
        listed.add((method, target))
    assert documented - listed == {("GET", "/livez"), ("GET", "/readyz")}


@pytest.mark.parametrize(
    "headers",
    [
        row("F1: no token", []),
        row("F1: Basic", [("Authorization", "Basic cHJlZGljdC1zZWNyZXQ=")]),
        row("F1: an empty token", [("Authorization", "Bearer ")]),
        row("F1: two headers", [bearer("predict-secret"), bearer("predict-secret")]),
        row("F2: a wrong token of the right length", [bearer("predict-secreT")]),
        row("F2: a prefix", [bearer("predict-secre")]),
        row("F2: the token and a NUL", [bearer("predict-secret\0")]),
        row("F2: 1 MB", [bearer("a" * 2**20)]),
    ],
)
def test_is_not_authenticated(guarded: Client, headers: Headers) -> None:
    response = guarded("POST", PREDICT, [("Content-Type", "image/png"), *headers], png(), on_receive=unread)
    assert_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


def test_f3_scores_are_shown_to_the_admin_scope_alone(guarded: Client) -> None:
    explain = PREDICT + "?explain=1"
    assert_problem(guarded("POST", explain, [bearer("predict-secret")], png(), on_receive=unread), 403, "forbidden")
    assert guarded("POST", explain, [bearer("admin-secret")], png()).json()["explanation"] is not None
    assert guarded("POST", PREDICT, [bearer("admin-secret")], png()).json()["explanation"] is None


@pytest.mark.parametrize("query", ["token=predict-secret", "access_token=predict-secret", "Authorization=Bearer%20predict-secret"])
def test_f5_a_token_in_the_query_is_none_and_is_not_logged(guarded: Client, capfd: pytest.CaptureFixture[str], query: str) -> None:
    response = guarded("GET", f"{GUARD}?{query}")
    assert_problem(response, 401, "unauthenticated")
    assert "predict-secret" not in "".join(capfd.readouterr()) + response.text


def test_f6_the_refusal_comes_before_the_body(guarded: Client) -> None:
    for target in (PREDICT, UPLOAD):
        headers = [("Content-Type", MULTIPART), ("Content-Length", str(2 * 2**20))]
        assert_problem(guarded("POST", target, headers, b"slow", on_receive=unread), 401, "unauthenticated")


def test_f7_after_20_wrong_tokens_a_peer_is_not_heard_and_the_right_token_still_is(guarded: Client) -> None:
    answers = [guarded("GET", GUARD, [bearer(f"wrong-guess-{number}")]) for number in range(25)]
    for answer in answers[:20]:
        assert_problem(answer, 401, "unauthenticated")
    for answer in answers[20:]:
        assert_problem(answer, 429, "rate_limited")
    assert guarded("GET", GUARD, [bearer("predict-secret")]).status_code == 200
    assert_problem(guarded("GET", GUARD, [bearer("wrong-guess")], peer="10.0.0.9"), 401, "unauthenticated")


def test_f10_health_needs_no_token_and_metrics_do(guarded: Client) -> None:
    assert [guarded("GET", path).status_code for path in ("/livez", "/readyz")] == [200, 200]
    assert_problem(guarded("GET", "/metrics"), 401, "unauthenticated")
    assert guarded("GET", "/metrics", [bearer("metrics-secret")]).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect"])
def test_f10_the_docs_can_be_switched_off(tmp_path: Path, path: str) -> None:
    with serving(make_service(tmp_path, docs=False)) as client:
        assert_problem(client("GET", path), 404, "not_found")
