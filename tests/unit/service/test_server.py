"""A server that cannot start says what to do."""

from __future__ import annotations

import pytest

from service import server
from service.settings import Settings


def test_a_device_that_is_not_there_keeps_it_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_configure_logging", lambda: None)  # which is the whole process's
    with pytest.raises(server.CannotStart, match="'gpu' cannot be used here"):
        server.serve(Settings(device="gpu"))
