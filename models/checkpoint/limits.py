"""What one checkpoint may cost, and how the names in it are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one file may cost. The defaults hold a hostile file to some seconds and about 0.5 GB beside what it inflates to."""

    file_bytes: int = 4 << 30
    header_bytes: int = 1 << 20  # of safetensors; 10,000 tensors fit
    tensors: int = 10_000  # of the state dict
    weight_bytes: int = 8 << 30  # all tensors of the state dict written out, shared ones once for each name
    pickle_bytes: int = 512 << 20  # pixels inside the pickle are passed over unread, so this may be large
    pickle_opcodes: int = 4_000_000
    zip_entries: int = 100_000
    name_length: int = 512
    expansion: int = 8  # inflated and shared bytes, as multiples of the file, where they are more than `expansion_floor`
    expansion_floor: int = 16 << 20


def clean_name(name: str) -> str:
    """A name from the file, fit for a message, a log and a page: at most 60 plain characters."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", "?", name[:60])


def listed(names: Sequence[str]) -> str:
    return ", ".join(clean_name(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
