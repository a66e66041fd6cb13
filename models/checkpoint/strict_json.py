"""JSON of untrusted files: nothing twice, no NaN, no depth that overflows."""

from __future__ import annotations

import json
from typing import Any


def parse(data: bytes) -> Any:
    """The value; raises ValueError where it is no JSON in UTF-8, or says a thing twice."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return made


def _constant(_: str) -> object:
    raise ValueError("NaN or infinity")
