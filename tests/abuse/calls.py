"""The calls that hostile requests are made of, and what they must leave as it is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import Client

ACTIVE, GUARD, UPLOAD, PREDICT = "/v1/guards/cifar/active", "/v1/guards/cifar", "/v1/calibrations", "/v1/guards/cifar/predict"
TOKENS = {"predict_token": "predict-secret", "admin_token": "admin-secret", "metrics_token": "metrics-secret"}


def state(client: Client) -> Any:
    """What a refused request must not change."""
    guard, jobs = client("GET", GUARD).json(), client("GET", UPLOAD).json()
    return guard, jobs, sorted(client.service.worker.uploads.rglob("*"))


def bearer(token: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {token}"


def row(name: str, *values: object) -> Any:
    return pytest.param(*values, id=name)


def unread() -> None:
    raise AssertionError("the body was read")
