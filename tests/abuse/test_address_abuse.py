"""Rows E13 to E20 of the abuse catalogue: methods, paths and headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.abuse.calls import GUARD, PREDICT, TOKENS, UPLOAD, bearer, row
from tests.support import Client, Headers, assert_problem, make_service, png, serving


@pytest.mark.parametrize(
    ("method", "target", "status", "allow"),
    [
        row("E13: an unknown path", "GET", "/nowhere", 404, None),
        row("E13: the root", "GET", "/", 404, None),
        row("E13: GET on predict", "GET", PREDICT, 405, "POST"),
        row("E13: PUT on a guard", "PUT", GUARD, 405, "GET, PATCH"),
        row("E13: DELETE on calibrations", "DELETE", UPLOAD, 405, "GET, POST"),
        row("E13: POST on a calibration", "POST", UPLOAD + "/x", 405, "DELETE, GET"),
        row("E13: HEAD", "HEAD", GUARD, 405, "GET, PATCH"),
        row("E13: OPTIONS", "OPTIONS", PREDICT, 405, "POST"),
        row("E13: TRACE", "TRACE", PREDICT, 405, "POST"),
        row("E13: CONNECT", "CONNECT", PREDICT, 405, "POST"),
        row("E13: a method of the caller's making", "BREW", PREDICT, 405, "POST"),
        row("E13: two slashes", "POST", "//v1/guards/cifar/predict", 404, None),
        row("E13: a slash at the end", "POST", PREDICT + "/", 404, None),
        row("E13: another case", "POST", "/V1/guards/cifar/predict", 404, None),
        row("E14: ../../etc/passwd", "GET", "/../../etc/passwd", 404, None),
        row("E14: %2e%2e", "GET", "/v1/%2e%2e/", 404, None),
        row("E14: a NUL at the end", "POST", PREDICT + "%00", 404, None),
        row("E14: a path of 8 KB", "GET", "/" + "a" * 8000, 404, None),
    ],
)
def test_a_path_or_method_is_refused(client: Client, method: str, target: str, status: int, allow: str | None) -> None:
    response = client(method, target, [("Content-Type", "image/png")], png())
    assert_problem(response, status, "not_found" if status == 404 else "method_not_allowed")
    assert response.headers.get("allow") == allow


@pytest.mark.parametrize(
    "headers",
    [
        row("E15: 5,000 ranges", [("Range", "bytes=" + ",".join(f"{i}-" for i in range(5000)))]),
        row("E16: Accept: text/html", [("Accept", "text/html")]),
        row("E16: an Accept that is none", [("Accept", ";;q=x,"), ("Accept-Encoding", "br;q=x")]),
        row("E18: forwarded", [("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-Host", "evil"), ("X-Forwarded-Proto", "gopher"), ("Forwarded", "for=6.6.6.6")]),
        row("E18: another URL", [("X-Original-URL", "/v1/calibrations"), ("X-Rewrite-URL", "/metrics"), ("X-HTTP-Method-Override", "DELETE")]),
        row("E19: an upgrade", [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]),
        row("E19: h2c", [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "")]),
    ],
)
def test_headers_that_mean_nothing_here_change_nothing(client: Client, headers: Headers) -> None:
    response = client.predict(png(), "image/png", *headers)
    assert (response.status_code, response.headers["content-type"], response.json()["verdict"]) == (200, "application/json", "accepted")
    assert_problem(client("GET", "/nowhere", headers), 404, "not_found")


@pytest.mark.parametrize("given", ["a" * 1024, "a%0d%0aX-Evil:1", "\x1b[31mred", "host:8080", "short", "", "<script>alert</script>", "a b c d e f"])
def test_e17_a_request_id_that_is_not_plain_is_replaced(client: Client, given: str) -> None:
    for response in (client.predict(png(), "image/png", ("X-Request-Id", given)), client("GET", "/nowhere", [("X-Request-Id", given)])):
        (answered,) = response.headers.get_list("x-request-id")
        assert answered != given and len(answered) == 32
        assert response.json()["request_id"] == answered


@pytest.mark.parametrize("given", ["01234567-89ab-cdef-0123-456789abcdef", "a" * 64, "trace_1.2-3"])
def test_e17_a_plain_request_id_is_kept(client: Client, given: str) -> None:
    response = client.predict(png(), "image/png", ("X-Request-Id", given))
    assert response.headers.get_list("x-request-id") == [response.json()["request_id"]] == [given]


def test_e18_the_peer_of_wrong_tokens_is_the_connection_and_no_header(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, **TOKENS)) as client:
        for number in range(20):
            client("GET", GUARD, [bearer("wrong-guess"), ("X-Forwarded-For", f"10.0.0.{number}")])
        assert_problem(client("GET", GUARD, [bearer("wrong-guess"), ("X-Forwarded-For", "10.9.9.9")]), 429, "rate_limited")


def test_e20_paths_are_counted_by_their_template(client: Client) -> None:
    for number in range(100):
        client("GET", f"/v1/guards/nobody-{number}")
        client("GET", f"/nowhere-{number}")
    text = client("GET", "/metrics").text
    assert 'route="/v1/guards/{guard}"' in text and 'route="unmatched"' in text
    assert "nobody-" not in text and "nowhere-" not in text
