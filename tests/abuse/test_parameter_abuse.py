"""Rows D1 to D12 of the abuse catalogue: JSON, parameters and ids."""

from __future__ import annotations

import json

import pytest

from tests.abuse.calls import ACTIVE, GUARD, PREDICT, UPLOAD, row
from tests.support import MULTIPART, Client, Headers, assert_problem, form, part, png


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        row("D1: no JSON", b"{bad", 400, "json_invalid"),
        row("D1: nothing", b"", 400, "json_invalid"),
        row("D1: null", b"null", 422, "config_invalid"),
        row("D1: a list", b"[]", 422, "config_invalid"),
        row("D1: a text", b'"x"', 422, "config_invalid"),
        row("D1: 64 KiB and 1 byte", b" " * (64 * 1024 + 1), 413, "body_too_large"),
        row("D2: NaN", b'{"version": NaN, "target_fpr": NaN}', 422, "config_invalid"),
        row("D2: Infinity", b'{"version": Infinity, "target_fpr": Infinity}', 422, "config_invalid"),
        row("D2: -Infinity", b'{"version": -Infinity, "target_fpr": -Infinity}', 422, "config_invalid"),
        row("D2: 1e400", b'{"version": 1e400, "target_fpr": 1e400}', 422, "config_invalid"),
        row("D3: a lone surrogate in a value", rb'{"version": "\ud800", "mode": "\ud800"}', 422, "config_invalid"),
        row("D3: a lone surrogate in a key", rb'{"\udfff": 1}', 422, "config_invalid"),
        row("D4: invalid UTF-8", b'{"mode": "\xff"}', 400, "json_invalid"),
        row("D4: UTF-16", '{"version": 1}'.encode("utf-16"), 400, "json_invalid"),
        row("D4: a byte order mark", b'\xef\xbb\xbf{"version": 1}', 400, "json_invalid"),
        row("D5: 30,000 nested lists", b"[" * 30_000 + b"]" * 30_000, 400, "json_invalid"),
        row("D5: an integer of 5,000 digits", b'{"version": ' + b"9" * 5000 + b"}", 400, "json_invalid"),
        row("D6: a key twice", b'{"version": 1, "version": 1}', 400, "json_invalid"),
        row("D7: an unknown key", b'{"versoin": 1}', 422, "config_invalid"),
        row("D7: __proto__", b'{"__proto__": {"version": 1}}', 422, "config_invalid"),
        row("D7: __class__", b'{"__class__": "Settings"}', 422, "config_invalid"),
    ],
)
@pytest.mark.parametrize(("method", "target"), [row("activate", "PUT", ACTIVE), row("change", "PATCH", GUARD)])
def test_a_json_body_is_refused(client: Client, method: str, target: str, body: bytes, status: int, code: str) -> None:
    assert_problem(client.json(method, target, body), status, code)


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        row("D8: target_fpr 0", "PATCH", GUARD, '{"target_fpr": 0}'),
        row("D8: target_fpr 1", "PATCH", GUARD, '{"target_fpr": 1}'),
        row("D8: target_fpr -0.1", "PATCH", GUARD, '{"target_fpr": -0.1}'),
        row("D8: target_fpr 0.5", "PATCH", GUARD, '{"target_fpr": 0.5}'),
        row("D8: target_fpr in quotes", "PATCH", GUARD, '{"target_fpr": "0.01"}'),
        row("D8: target_fpr true", "PATCH", GUARD, '{"target_fpr": true}'),
        row("D8: target_fpr of 4,000 digits", "PATCH", GUARD, '{"target_fpr": ' + "9" * 4000 + "}"),
        row("D8: an unknown mode", "PATCH", GUARD, '{"mode": "off"}'),
        row("D10: version 0", "PUT", ACTIVE, '{"version": 0}'),
        row("D10: version -1", "PUT", ACTIVE, '{"version": -1}'),
        row("D10: version 1.0", "PUT", ACTIVE, '{"version": 1.0}'),
        row("D10: version in quotes", "PUT", ACTIVE, '{"version": "1"}'),
        row("D10: version true", "PUT", ACTIVE, '{"version": true}'),
        row("D10: version of 4,000 digits", "PUT", ACTIVE, '{"version": ' + "9" * 4000 + "}"),
        row("D10: no version", "PUT", ACTIVE, "{}"),
    ],
)
def test_a_field_out_of_its_range_is_refused_by_its_name(client: Client, method: str, target: str, body: str) -> None:
    problem = assert_problem(client.json(method, target, body), 422, "config_invalid")
    assert {error["field"] for error in problem["errors"]} <= {"target_fpr", "mode", "version"}
    assert "9999" not in json.dumps(problem)


def test_d9_a_target_that_the_validation_images_cannot_promise_is_refused_with_the_least_that_they_can(client: Client) -> None:
    problem = assert_problem(client.json("PATCH", GUARD, '{"target_fpr": 0.001}'), 422, "fpr_unreachable")
    assert "0.005" in problem["detail"]


@pytest.mark.parametrize("headers", [row("D11: as text", [("Content-Type", "text/plain")]), row("D11: without a type", [])])
@pytest.mark.parametrize(("method", "target"), [("PUT", ACTIVE), ("PATCH", GUARD)])
def test_json_must_be_called_json(client: Client, method: str, target: str, headers: Headers) -> None:
    assert_problem(client(method, target, headers, b'{"version": 1}'), 415, "media_type")


IDS = [
    row("D12: ..", ".."),
    row("D12: %2e%2e%2f", "%2e%2e%2f"),
    row("D12: %2e%2e", "%2e%2e"),
    row("D12: a NUL", "%00"),
    row("D12: a name and a NUL", "cifar%00"),
    row("D12: 10 KB", "a" * 10_000),
    row("D12: digits of another script", "%D9%A1"),
    row("D12: upper case", "CIFAR"),
    row("D12: a quote", "cifar'--"),
    row("D12: a newline", "cifar%0a"),
    row("D12: what is no UTF-8", "%ff%fe"),
    row("D12: the staging folder", ".staging"),
]


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("GET", "/v1/guards/{}", ""),
        ("PATCH", "/v1/guards/{}", '{"mode": "shadow"}'),
        ("PATCH", "/v1/guards/{}", '{"target_fpr": 0.1}'),
        ("PUT", "/v1/guards/{}/active", '{"version": 1}'),
        ("DELETE", "/v1/guards/{}/versions/1", ""),
        ("DELETE", "/v1/guards/cifar/versions/{}", ""),
        ("GET", "/v1/calibrations/{}", ""),
        ("GET", "/v1/calibrations/{}/events", ""),
        ("GET", "/v1/calibrations/{}/report", ""),
        ("DELETE", "/v1/calibrations/{}", ""),
    ],
)
def test_an_id_that_is_none_is_not_found(client: Client, method: str, target: str, body: str, name: str) -> None:
    assert_problem(client.json(method, target.format(name), body), 404, "not_found")


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("call", ["predict", "predict-batch"])
def test_a_guard_that_is_none_judges_nothing(client: Client, call: str, name: str) -> None:
    assert_problem(client("POST", f"/v1/guards/{name}/{call}", [("Content-Type", MULTIPART)], form(part("image", png()))), 404, "not_found")


@pytest.mark.parametrize("version", ["0", "01x", "-1", "1.0", "9" * 5000, "²", "+1"])
def test_d12_a_version_that_is_none_is_not_found(client: Client, version: str) -> None:
    target = f"/v1/guards/cifar/versions/{version.encode('utf-8').decode('latin-1')}"
    assert_problem(client("DELETE", target), 404, "not_found")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=" + "9" * 5000])
def test_a_query_out_of_its_range_is_refused_and_not_echoed(client: Client, query: str) -> None:
    problem = assert_problem(client("GET", f"{UPLOAD}?{query}"), 422, "config_invalid")
    assert [error["field"] for error in problem["errors"]] == ["query.limit"]
    assert "9999" not in json.dumps(problem)


def test_explain_must_be_a_truth_value(client: Client) -> None:
    assert_problem(client("POST", PREDICT + "?explain=perhaps", [("Content-Type", "image/png")], png()), 422, "config_invalid")
