"""The description of all calls, /openapi.json, and the page that shows it, /docs.

Without tokens a page of this origin may administer the service. So the page is Swagger UI as this package has it, and browsers are told to run nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response

from models.errors import NotFound

FILES = Path(__file__).parent / "swagger"
PARTS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "start.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PROBLEM: dict[str, Any] = {
    "description": "What is wrong, and what to do about it: docs/reference/errors.md has all codes",
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "properties": {
                    **{name: {"type": "string"} for name in ("type", "title", "code", "detail", "request_id")},
                    "status": {"type": "integer"},
                    "errors": {"type": "array", "items": {"type": "object"}},
                },
            }
        }
    },
}


def add_docs(app: FastAPI) -> None:
    """Serve both."""
    page = (FILES / "index.html").read_text()
    parts = {name: (FILES / name).read_bytes() for name in PARTS}  # in whole: Starlette's FileResponse answers a Range that is wrong in plain text

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return describe(app)

    @app.get("/docs/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in parts:
            raise NotFound
        return Response(parts[name], media_type=PARTS[name])


def describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with what FastAPI does not know: tokens, and that whatever goes wrong is answered with a problem."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = found.setdefault("components", {})
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "description": "where tokens are set"}}
        parts["responses"] = {"Problem": PROBLEM}
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        for methods in found["paths"].values():
            for call in methods.values():
                call["security"] = [{}, {"token": []}]  # either none or that
                call["responses"].pop("422", None)
                call["responses"]["default"] = {"$ref": "#/components/responses/Problem"}
        app.openapi_schema = found
    return app.openapi_schema
