"""Whoever waits for an answer, and whether they still do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

CALLER = "badexpert.caller"  # extension of a scope: the `Caller` of this message


class Caller:
    """Of one request. What works for it says here whom to tell should it leave."""

    def __init__(self) -> None:
        self.left = False
        self._told: list[Callable[[], object]] = []

    def leave(self) -> None:
        """The connection is gone: no answer can reach anybody."""
        self.left = True
        for tell in list(self._told):
            tell()

    def watch(self, tell: Callable[[], object]) -> None:
        """Call this when the caller leaves."""
        self._told.append(tell)

    def unwatch(self, tell: Callable[[], object]) -> None:
        """No longer; of something that was watched."""
        self._told.remove(tell)


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """That of a message; one who never leaves where the server does not tell."""
    found: Caller = ((scope.get("extensions") or {}).get(CALLER) or {}).get("caller") or Caller()
    return found
