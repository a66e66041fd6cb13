"""What canaries give cause to warn of, and that every warning has its section."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from calibration import checks

DOC = Path(__file__).parent.parent.parent.parent / "docs" / "checks.md"


def canaries(*powers: float | None) -> list[dict[str, Any]]:
    return [{"kind": f"kind{index}", "asr": 0.3 if power is None else 0.95, "took": power is not None, "power": power} for index, power in enumerate(powers)]


@pytest.mark.parametrize("powers", [(1.0, 0.9, 0.1), (0.5, 0.5), (1.0, None), (None, None), ()])
def test_a_guard_that_catches_half_of_what_was_planted_is_not_doubted(powers: tuple[float | None, ...]) -> None:
    assert checks.low_power(canaries(*powers)) is None


def test_a_guard_that_catches_less_than_half_is() -> None:
    found = checks.low_power(canaries(0.9, 0.2, 0.1, None))
    assert found is not None
    assert found.code == "low-power"
    assert "kind0 90%, kind1 20%, kind2 10%" in found.detail


def test_it_is_told_where_nothing_could_be_planted() -> None:
    found = checks.no_canary_took(canaries(None, None))
    assert found is not None
    assert "None of 2 backdoors" in found.detail
    assert "30%" in found.detail
    assert checks.no_canary_took(canaries(None, 0.1)) is None
    assert checks.no_canary_took([]) is None  # none were asked for


def test_every_warning_has_a_section() -> None:
    codes = set(re.findall(r'Caution\("([a-z-]+)"', inspect.getsource(checks)))
    assert len(codes) > 8
    assert codes <= set(re.findall(r"^## ([a-z-]+)$", DOC.read_text(), re.M))
