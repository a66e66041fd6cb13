"""Walks the tree of refusals: every class is a row of the reference, and is rendered in the one shape."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import service.errors
from models.errors import Problem, all_problems, from_code
from service.errors import FieldsInvalid, MethodNotAllowed, RequestProblem, from_http, render

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "errors.md"


def ours() -> list[type[Problem]]:
    """Those of the packages; tests may have made some, too."""
    assert service.errors
    return [kind for kind in all_problems() if kind.__module__.split(".")[0] in ("models", "calibration", "service")]


def identified(kind: type[Problem]) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", ours(), ids=identified)
def test_a_problem_says_what_it_is_and_what_to_do(kind: type[Problem]) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code)
    assert 400 <= kind.status <= 599
    assert kind.title and not kind.title.endswith(".")
    assert inspect.getdoc(kind) and "__doc__" in vars(kind), "the docstring is the default detail, so each has its own"
    detail = kind().detail
    assert (detail.endswith(".") and "\n" not in detail and detail[0].isupper()) or detail.startswith("X-"), detail


def test_a_code_belongs_to_one_class_and_those_that_inherit_it() -> None:
    owners: dict[str, type[Problem]] = {}
    for kind in ours():
        if "code" in vars(kind):
            owner = owners.setdefault(kind.code, kind)
            # A setting of a calibration and a field of a request are refused alike; a caller need not tell the two apart.
            assert owner is kind or {owner.__name__, kind.__name__} == {"ConfigInvalid", "FieldsInvalid"}, (owner, kind)


def test_the_reference_has_a_row_for_each_code_and_it_is_what_is_answered() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d+) \| (.+?) \| (.+) \|$", REFERENCE.read_text(), re.MULTILINE)
    assert [code for code, *_ in rows] == sorted({kind.code for kind in ours()})
    for code, status, title, detail in rows:
        kinds = [kind for kind in ours() if kind.code == code]
        assert {(str(kind.status), kind.title) for kind in kinds} == {(status, title)}, code
        assert detail in {kind().detail for kind in kinds}, code


@pytest.mark.parametrize("kind", ours(), ids=identified)
def test_a_problem_is_rendered_in_the_one_shape(kind: type[Problem]) -> None:
    response = render(kind(), "0123456789abcdef")
    body = json.loads(bytes(response.body))
    assert list(body) == ["type", "title", "status", "code", "detail", "request_id"]
    assert (response.status_code, body["status"], body["code"]) == (kind.status, kind.status, kind.code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"] == body["request_id"] == "0123456789abcdef"
    assert ("retry-after" in response.headers) == (kind.status in (429, 503))


def test_fields_that_are_wrong_are_listed() -> None:
    body = json.loads(bytes(render(FieldsInvalid(None, errors=[{"field": "a", "message": "b"}]), "0123456789abcdef").body))
    assert body["errors"] == [{"field": "a", "message": "b"}]


@pytest.mark.parametrize("kind", ours(), ids=identified)
def test_what_another_process_reported_by_code_comes_back_with_its_status_and_detail(kind: type[Problem]) -> None:
    problem = from_code(kind.code, "So it was.")
    assert (problem.code, problem.status, problem.detail) == (kind.code, kind.status, "So it was.")


def test_a_code_from_elsewhere_is_an_internal_error() -> None:
    assert from_code("no_such_code", "x").code == "internal"


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (405, "method_not_allowed"), (413, "body_too_large"), (400, "bad_request"), (500, "internal")]
)
def test_what_the_framework_raises_becomes_one_of_ours(status: int, code: str) -> None:
    assert from_http(status, None).code == code


def test_a_405_keeps_the_methods_that_are_taken() -> None:
    problem = from_http(405, {"Allow": "GET, PUT"})
    assert isinstance(problem, MethodNotAllowed)
    assert problem.headers == {"Allow": "GET, PUT"}


def test_an_internal_error_says_nothing_of_its_cause() -> None:
    response = render(Problem(), "0123456789abcdef")
    assert json.loads(bytes(response.body))["detail"] == "Something went wrong inside the guard; the request id finds it in the log."
    assert not isinstance(Problem(), RequestProblem)
