"""Files as memory: nothing is read before it is looked at."""

from __future__ import annotations

import mmap
from pathlib import Path

from models.errors import CheckpointInvalid


def map_file(path: Path, most: int) -> memoryview:
    """A private map of a file of at most `most` bytes. Copy on write: tensors over a read-only map would crash the process when written to."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size > most:
            raise CheckpointInvalid(f"The file is larger than {most:,} bytes.")
        if not size:
            raise CheckpointInvalid("The checkpoint is empty or cut short.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
