"""Rows D1 to D14, E13 to E20, F1 to F10, G1 to G4, G11 and G12 of the abuse catalogue, as far as the application owns them: everything about a
request but its image. After every row a good image is judged as before."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models.registry import Registry
from service.engine import Engine, LiveGuard, Outcome
from service.jobs import Jobs
from tests.support import ACCEPTS_ALL, MULTIPART, Client, Headers, assert_problem, form, make_registry, make_service, part, png, publish, serving

ACTIVE, GUARD, UPLOAD, PREDICT = "/v1/guards/cifar/active", "/v1/guards/cifar", "/v1/calibrations", "/v1/guards/cifar/predict"
TOKENS = {"predict_token": "predict-secret", "admin_token": "admin-secret", "metrics_token": "metrics-secret"}


@pytest.fixture(scope="module")
def module_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("data"), upload_bytes=1024 * 1024)) as client:
        yield client


@pytest.fixture
def client(module_client: Client) -> Iterator[Client]:
    before = state(module_client)
    yield module_client
    module_client.assert_serves()
    assert state(module_client) == before, "a refused request has changed something"


def state(client: Client) -> Any:
    guard, jobs = client("GET", GUARD).json(), client("GET", UPLOAD).json()
    return guard, jobs, sorted(client.service.worker.uploads.rglob("*"))


def bearer(token: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {token}"


def row(name: str, *values: object) -> Any:
    return pytest.param(*values, id=name)


# D: JSON, parameters, ids


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


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return make_registry(tmp_path)


def break_weights(folder: Path) -> None:
    data = bytearray((folder / "auxiliary.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "auxiliary.safetensors").write_bytes(data)


def future_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["content"]["schema"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "spoil",
    [
        row("D13: without a manifest", lambda folder: (folder / "manifest.json").unlink()),
        row("D13: without a weight file", lambda folder: (folder / "experts.safetensors").unlink()),
        row("D13: with a file too many", lambda folder: (folder / "extra").touch()),
        row("D13: with a changed weight", break_weights),
        row("D13: of a future schema", future_schema),
    ],
)
def test_p11_a_version_that_cannot_be_served_does_not_become_active(tmp_path: Path, registry: Registry, spoil: Callable[[Path], None]) -> None:
    spoil(registry.folder("cifar", publish(registry, seed=5)))
    with serving(make_service(tmp_path, registry=registry)) as client:
        before = client.predict(png()).json()["bundle_id"]
        assert_problem(client.json("PUT", ACTIVE, '{"version": 2}'), 409, "bundle_not_ready")
        assert client("GET", GUARD).json()["active"] == 1
        assert client.predict(png()).json()["bundle_id"] == before


def test_d13_an_unknown_version_is_not_found(client: Client) -> None:
    assert_problem(client.json("PUT", ACTIVE, '{"version": 2}'), 404, "not_found")


def test_p11_a_version_that_cannot_promise_the_target_in_force_does_not_become_active(tmp_path: Path, registry: Registry) -> None:
    publish(registry, images=20)
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert client.json("PATCH", GUARD, '{"target_fpr": 0.01}').json()["target_fpr"] == 0.01
        assert_problem(client.json("PUT", ACTIVE, '{"version": 2}'), 422, "fpr_unreachable")
        assert (client("GET", GUARD).json()["active"], client.predict(png()).json()["version"]) == (1, 1)


def test_p2_after_a_swap_everything_in_an_answer_is_of_the_new_bundle(tmp_path: Path, registry: Registry) -> None:
    publish(registry, seed=5)
    with serving(make_service(tmp_path, registry=registry)) as client:
        bundles = {version["version"]: version["bundle_id"] for version in client("GET", GUARD).json()["versions"]}
        for version in (2, 1):  # forward, and back
            assert client.json("PUT", ACTIVE, f'{{"version": {version}}}').json()["active"] == version
            answer = client.predict(png()).json()
            assert (answer["version"], answer["bundle_id"]) == (version, bundles[version])


def test_d14_the_active_version_cannot_be_deleted_and_another_can(tmp_path: Path, registry: Registry) -> None:
    publish(registry)
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert_problem(client("DELETE", GUARD + "/versions/1"), 409, "conflict")
        assert client("DELETE", GUARD + "/versions/2").status_code == 204
        assert [version["version"] for version in client("GET", GUARD).json()["versions"]] == [1]


def test_d14_a_job_that_has_ended_cannot_be_cancelled_and_a_cancelled_one_can_again(tmp_path: Path) -> None:
    with serving(make_service(tmp_path)) as client:

        async def prepare(jobs: Jobs) -> None:
            for job_id in ("finished", "waiting"):
                await jobs.add(job_id, {"name": "cifar"}, "digest", None)
            await jobs.claim()
            await jobs.end("finished", "failed", {"status": 422, "code": "suspect_model_useless", "title": "t", "detail": "d"})

        client.runner.run(prepare(client.service.jobs))
        assert_problem(client("DELETE", UPLOAD + "/finished"), 409, "conflict")
        for _ in range(2):
            answer = client("DELETE", UPLOAD + "/waiting")
            assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
        assert_problem(client("GET", UPLOAD + "/finished/report"), 409, "conflict")
        assert client("GET", UPLOAD + "/finished").json()["problem"]["code"] == "suspect_model_useless"
        metrics = client("GET", "/metrics").text
        assert 'badexpert_calibrations_total{outcome="cancelled"} 1.0' in metrics


# Uploads that are refused before anything is read by a child process


CONFIG = part("config", b'{"name": "new"}', None)
CHECKPOINT, CLEAN = part("checkpoint", b"x"), part("clean_set", b"x")


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        row("no multipart", "application/json", b"{}", 415, "media_type"),
        row("no type", "", b"{}", 415, "media_type"),
        row("nothing", MULTIPART, form(), 422, "upload_missing"),
        row("no config", MULTIPART, form(CHECKPOINT, CLEAN), 422, "upload_missing"),
        row("no checkpoint", MULTIPART, form(CONFIG, CLEAN), 422, "upload_missing"),
        row("no clean set", MULTIPART, form(CONFIG, CHECKPOINT), 422, "upload_missing"),
        row("a checkpoint as text", MULTIPART, form(CONFIG, part("checkpoint", b"x", None), CLEAN), 422, "upload_missing"),
        row("an unknown part", MULTIPART, form(CONFIG, CHECKPOINT, CLEAN, part("../evil", b"x")), 422, "unexpected_field"),
        row("a part twice", MULTIPART, form(CONFIG, CHECKPOINT, CHECKPOINT, CLEAN), 422, "unexpected_field"),
        row("never closed", MULTIPART, CONFIG + CHECKPOINT + CLEAN, 400, "multipart_invalid"),
        row("a config of more than 64 KiB", MULTIPART, form(part("config", b" " * 65537, None)), 413, "body_too_large"),
        row("D1: a config that is no JSON", MULTIPART, form(part("config", b"{bad", None), CHECKPOINT, CLEAN), 400, "json_invalid"),
        row("D2: NaN in a config", MULTIPART, form(part("config", b'{"name": "a", "target_fpr": NaN}', None), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D7: an unknown key in a config", MULTIPART, form(part("config", b'{"name": "a", "lr": 1}', None), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D10: a seed of 2^64", MULTIPART, form(part("config", b'{"name": "a", "seed": 18446744073709551616}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D10: a seed of -1", MULTIPART, form(part("config", b'{"name": "a", "seed": -1}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("B16: a checkpoint over its cap", MULTIPART, form(CONFIG, part("checkpoint", bytes(1024 * 1024 + 1))), 413, "body_too_large"),
        row(
            "B19: an unknown architecture", MULTIPART, form(part("config", b'{"name": "a", "architecture": "../x"}'), CHECKPOINT, CLEAN), 422, "config_invalid"
        ),
        row("D12: a guard's name that is a path", MULTIPART, form(part("config", b'{"name": "../a"}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
    ],
)
def test_an_upload_is_refused_and_leaves_nothing_behind(client: Client, content_type: str, body: bytes, status: int, code: str) -> None:
    assert_problem(client("POST", UPLOAD, [("Content-Type", content_type)] if content_type else [], body), status, code)


def test_g8_where_no_more_calibrations_may_wait_an_upload_is_refused_unread(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, queued_jobs=1)) as client:
        client.runner.run(client.service.jobs.add("waiting", {"name": "cifar"}, "digest", None))
        response = client("POST", UPLOAD, [("Content-Type", MULTIPART)], form(CONFIG, CHECKPOINT, CLEAN), on_receive=unread)
        assert_problem(response, 429, "queue_full")


def unread() -> None:
    raise AssertionError("the body was read")


# E: methods, paths, headers


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


# F: who may call what


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
    named = {"/v1/guards/cifar": "/v1/guards/{guard}", "/calibrations/x": "/calibrations/{calibration}", "/versions/9": "/versions/{version}"}
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
    began = time.perf_counter()
    for target in (PREDICT, UPLOAD):
        headers = [("Content-Type", MULTIPART), ("Content-Length", str(2 * 2**20))]
        assert_problem(guarded("POST", target, headers, b"slow", on_receive=unread), 401, "unauthenticated")
    assert time.perf_counter() - began < 0.5  # 50 ms each, and room for a busy machine


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


# G: queues, deadlines, start and end


class Gated(Engine):
    """A device that begins each batch when the test lets it, and one batch at a time, however many cores this machine has."""

    def __init__(self, *collaborators: Any) -> None:
        super().__init__(*collaborators)
        self.slots = 1
        self.gate, self.images = threading.Semaphore(0), 0

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        assert self.gate.acquire(timeout=10)
        self.images += len(pixels)
        return super().run(live, pixels)


def admitted(client: Client, count: int) -> list[Any]:
    """Good requests under way: one on the gated device, the others in the queue behind it."""

    async def begin() -> list[Any]:
        tasks = []
        for number in range(count):
            tasks.append(asyncio.create_task(client.call("POST", PREDICT, [("Content-Type", "image/png")], png())))
            async with asyncio.timeout(10):
                while client.service.batcher.busy_since is None or client.service.batcher.waiting < number:
                    await asyncio.sleep(0.001)
        return tasks

    return list(client.runner.run(begin()))


def answered(client: Client, tasks: list[Any]) -> list[int]:
    async def wait() -> list[int]:
        return [(await task).status_code for task in tasks]

    return client.runner.run(wait())


def test_g1_a_full_queue_refuses_at_once_and_who_was_admitted_is_answered(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated, queue_images=2)) as client:
        engine = client.service.engine
        assert isinstance(engine, Gated)
        tasks = admitted(client, 3)
        began = time.perf_counter()
        assert_problem(client.predict(png()), 429, "overloaded")
        assert time.perf_counter() - began < 0.2  # 20 ms, and room for a busy machine
        assert "badexpert_queue_images 2.0" in client("GET", "/metrics").text
        engine.gate.release(10)
        assert answered(client, tasks) == [200, 200, 200]
        client.assert_serves()


def test_g3_a_deadline_that_passes_in_the_queue_is_answered_in_time_and_its_image_never_reaches_the_device(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated)) as client:
        engine = client.service.engine
        assert isinstance(engine, Gated)
        tasks = admitted(client, 1)
        began = time.perf_counter()
        assert_problem(client.predict(png(), "image/png", ("X-Deadline-Ms", "100")), 504, "deadline_exceeded")
        assert 0.09 < time.perf_counter() - began < 0.1 + 0.25 + 0.25  # the promise, and room for a busy machine
        engine.gate.release(10)
        assert answered(client, tasks) == [200]
        assert engine.images == 1
        client.assert_serves()


@pytest.mark.parametrize(
    ("milliseconds", "status", "code"),
    [
        row("G4: 0", "0", 504, "deadline_exceeded"),
        row("G4: -1", "-1", 504, "deadline_exceeded"),
        row("G4: letters", "abc", 422, "deadline_invalid"),
        row("G4: nothing", "", 422, "deadline_invalid"),
        row("G4: a fraction", "1.5", 422, "deadline_invalid"),
        row("G4: two signs", "--1", 422, "deadline_invalid"),
        row("G4: a sign alone", "-", 422, "deadline_invalid"),
        row("G4: a superscript", "\xb2", 422, "deadline_invalid"),
        row("G4: 5,000 digits", "9" * 5000, 422, "deadline_invalid"),
    ],
)
@pytest.mark.parametrize("call", ["predict", "predict-batch"])
def test_a_deadline_is_refused(client: Client, call: str, milliseconds: str, status: int, code: str) -> None:
    headers = [("Content-Type", MULTIPART), ("X-Deadline-Ms", milliseconds)]
    response = client("POST", f"/v1/guards/cifar/{call}", headers, form(part("image", png())))
    if call == "predict-batch" and status == 504:
        assert response.json()["items"][0]["problem"]["code"] == code
    else:
        assert_problem(response, status, code)


def test_g4_a_deadline_beyond_the_servers_own_is_the_servers_own(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated, deadline_seconds=0.1)) as client:
        assert isinstance(client.service.engine, Gated)
        assert_problem(client.predict(png(), "image/png", ("X-Deadline-Ms", "1000000000000")), 504, "deadline_exceeded")
        client.service.engine.gate.release(10)


def test_g11_a_guard_without_an_active_version_serves_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "guards")
    publish(registry)
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert_problem(client("POST", PREDICT + "-batch", [("Content-Type", MULTIPART)], form(part("image", png()))), 503, "no_active_bundle")
        assert_problem(client.json("PATCH", GUARD, '{"target_fpr": 0.1}'), 409, "conflict")
        assert client("GET", "/readyz").json()["guards"] == []
        assert client.json("PUT", ACTIVE, '{"version": 1}').json()["serving"] is True
        client.assert_serves()


@pytest.mark.parametrize(
    "spoil",
    [
        row("whose active version is damaged", lambda home: break_weights(home / "1")),
        row("whose active version is gone", lambda home: shutil.rmtree(home / "1")),
        row("whose state is damaged", lambda home: (home / "state.json").write_text("{")),
        row("whose target the active version cannot promise", lambda home: (home / "state.json").write_text('{"active": 1, "target_fpr": 0.0001}')),
    ],
)
def test_g11_a_guard_does_not_keep_the_server_from_starting(tmp_path: Path, registry: Registry, spoil: Callable[[Path], None]) -> None:
    publish(registry)
    registry.activate("other", publish(registry, "other", scores=ACCEPTS_ALL))
    spoil(tmp_path / "guards" / "cifar")
    with serving(make_service(tmp_path, registry=registry)) as client:
        ready = client("GET", "/readyz").json()
        assert (ready["guards"], list(ready["unavailable"])) == (["other"], ["cifar"])
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert client("POST", "/v1/guards/other/predict", [("Content-Type", "image/png")], png()).status_code == 200
        assert {guard["name"] for guard in client("GET", "/v1/guards").json()["guards"]} == {"cifar", "other"}


def test_g11_activation_mends_a_damaged_state(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "guards" / "cifar" / "state.json").write_text("{")
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert client.json("PUT", ACTIVE, '{"version": 1}').json()["serving"] is True
        client.assert_serves()


def test_g12_while_draining_everything_but_health_is_refused_and_what_was_admitted_is_finished(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated)) as client:
        assert isinstance(client.service.engine, Gated)
        tasks = admitted(client, 3)

        async def drain() -> None:
            client.service.begin_drain()

        client.runner.run(drain())
        for method, target in (("POST", PREDICT), ("GET", GUARD), ("POST", UPLOAD), ("GET", "/nowhere")):
            response = client(method, target, [("Content-Type", "image/png")], png(), on_receive=unread)
            assert_problem(response, 503, "draining")
            assert response.headers["connection"] == "close"
        assert_problem(client("GET", "/readyz"), 503, "not_ready")
        assert client("GET", "/livez").status_code == 200
        assert "badexpert_ready 0.0" in client("GET", "/metrics").text
        client.service.engine.gate.release(10)
        assert answered(client, tasks) == [200, 200, 200]


class Raising(Engine):
    """A device that fails on every batch with something that nobody foresaw."""

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        raise RuntimeError("CUDA error at /secret/path: out of luck")


def test_p8_a_failing_device_is_a_503_that_tells_nothing_of_its_insides(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Raising)) as client:
        assert "secret" not in json.dumps(assert_problem(client.predict(png()), 503, "device_failed"))


def test_p8_what_nobody_foresaw_is_a_500_in_the_one_shape(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(make_service(tmp_path)) as client:

        def broken(_: str) -> None:
            raise ZeroDivisionError("secret")

        client.service.engine.live = broken  # type: ignore[method-assign,assignment]
        problem = assert_problem(client.predict(png()), 500, "internal")
        assert "secret" not in json.dumps(problem)
        assert problem["request_id"] in "".join(capfd.readouterr())  # the log has it, with the trace
