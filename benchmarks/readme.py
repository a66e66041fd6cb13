"""The README's tables: each stands between marks that name the records it is written from."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
END = "<!-- end -->"


def filled(text: str, source: str, lines: list[str]) -> str:
    """The README's text with these lines as the table from `source`."""
    begin = f"<!-- from {source}: begin -->"
    before, rest = text.split(begin)
    return "\n".join([before + begin, *lines, END]) + rest.split(END, 1)[1]
