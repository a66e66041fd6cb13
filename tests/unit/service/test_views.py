"""Guards as the API shows them while others change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.engine import Engine
from service.views import GuardViews
from tests.support import make_registry, publish


def test_a_guard_whose_last_version_is_deleted_while_all_are_listed_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path)
    publish(registry, "a-guard")
    listed = registry.guards()
    registry.remove("a-guard", 1)
    monkeypatch.setattr(registry, "guards", lambda: listed)
    assert [view.name for view in GuardViews(Engine(registry, torch.device("cpu"))).all()] == ["cifar"]
