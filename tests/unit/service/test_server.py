"""A server that cannot start says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from service import server
from service.logs import Log
from service.settings import Settings


def test_a_device_that_is_not_there_keeps_it_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.logs, "configure", lambda: Log(-1))  # it is the whole process's
    with pytest.raises(server.CannotStart, match="'gpu' cannot be used here"):
        server.serve(Settings(device="gpu"))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({}, "all programs of this machine may administer"),
        ({"predict_token": "predict-secret"}, "nobody may administer"),
        ({"metrics_token": "metrics-secret"}, "nobody may administer"),
    ],
)
def test_it_says_who_may_administer(tokens: dict[str, Any], said: str) -> None:
    assert server._openness(Settings(**tokens)) == f"; no admin token is set: {said}"
    assert server._openness(Settings(**tokens, admin_token="admin-secret")) == ""
