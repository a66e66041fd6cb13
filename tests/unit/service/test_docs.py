"""/docs shows all calls and runs nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibration.config import CalibrationConfig
from service import docs
from tests.support import Client, make_service, serving


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with serving(make_service(tmp_path_factory.mktemp("data"))) as found:
        yield found


def test_the_page_loads_only_what_this_server_has(client: Client) -> None:
    page = client("GET", "/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(loaded) == ["docs/start.js", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css"]
    for name in loaded:
        answer = client("GET", f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] == ("text/css" if name.endswith("css") else "text/javascript")
    assert "<script>" not in page.text  # the policy would not let it run


@pytest.mark.parametrize("path", ["/docs/nothing.js", "/docs/../settings.py", "/docs/%2e%2e/settings.py", "/docs/", "/docs/README.md", "/redoc"])
def test_beside_them_there_is_nothing(client: Client, path: str) -> None:
    assert client("GET", path).status_code == 404


def test_what_is_there_cannot_be_written(client: Client) -> None:
    answer = client("POST", "/docs/start.js")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("wanted", ["bytes=zzz", "bytes=999999999-", "bytes=0-9", "bytes=" + "0-," * 1000])
def test_e15_a_range_is_passed_over(client: Client, wanted: str) -> None:
    answer = client("GET", "/docs/swagger-ui.css", [("Range", wanted)])
    assert (answer.status_code, answer.content) == (200, (docs.FILES / "swagger-ui.css").read_bytes())


def test_every_call_tells_of_tokens_and_problems(client: Client) -> None:
    found = client("GET", "/openapi.json").json()
    assert found["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    calls = [call for methods in found["paths"].values() for call in methods.values()]
    assert len(calls) > 15
    for call in calls:
        assert {"token": []} in call["security"]
        assert call["responses"]["default"] == {"$ref": "#/components/responses/Problem"}
        assert "422" not in call["responses"]
    assert "HTTPValidationError" not in str(found)


def test_the_configuration_of_an_upload_is_told_field_by_field_and_sent_as_json(client: Client) -> None:
    found = client("GET", "/openapi.json").json()
    body = found["paths"]["/v1/calibrations"]["post"]["requestBody"]["content"]["multipart/form-data"]
    config = body["schema"]["properties"]["config"]
    assert body["encoding"] == {"config": {"contentType": "application/json"}}
    assert {"name", "preset", "budget", "target_fpr", "architecture", "classes"} <= config["properties"].keys()
    assert all(CalibrationConfig.model_validate(example) for example in config["examples"])  # what the page offers to send


def test_all_files_are_installed_with_the_package() -> None:
    pattern = (Path(docs.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'service = ["swagger/*"]' in pattern
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "LICENSE", "NOTICE", "index.html", "start.js"} <= {path.name for path in docs.FILES.iterdir()}
