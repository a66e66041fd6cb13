"""Which named networks have these keys: a table that spares building a thousand of them to find one.

`index.tsv` has a line for each classification network of torchvision and timm: its name, a digest of its keys, a digest of their pattern (numbers
aside), how many keys and elements there are, and the usual side of its input. It only proposes: what it names is built on the meta device and
compared. It is made by `python -m models.architectures.index`, anew when either library is raised to a version with more networks.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.architectures.meta import build_on_meta

INDEX = Path(__file__).with_name("index.tsv")


@dataclass(frozen=True)
class Entry:
    """One network: `timm/NAME`, or a bare name of torchvision's."""

    name: str
    keys: str
    pattern: str
    count: int
    elements: int  # of all tensors, with a head of 1,000 classes
    size: int


@cache
def entries() -> dict[str, Entry]:
    """All entries by name, torchvision's first."""
    found = {}
    for line in INDEX.read_text().splitlines():
        name, keys, pattern, *numbers = line.split("\t")
        found[name] = Entry(name, keys, pattern, *map(int, numbers))
    return found


def digests(keys: Iterable[str]) -> tuple[str, str, int]:
    """Digest of the keys, digest of their pattern, and how many there are; batch counters, which old files lack, do not count."""
    names = sorted(key for key in keys if not key.endswith("num_batches_tracked"))
    patterns = sorted({re.sub(r"\d+", "#", name) for name in names})
    return _digest(names), _digest(patterns), len(names)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def with_keys(keys: Iterable[str]) -> list[Entry]:
    """The networks that have exactly these keys."""
    digest, _, _ = digests(keys)
    return [entry for entry in entries().values() if entry.keys == digest]


def resembling(tensors: Mapping[str, Tensor], most: int) -> list[Entry]:
    """Networks whose keys follow the same pattern (another depth or width, say), those of the nearest numbers of keys and elements first."""
    _, pattern, count = digests(tensors)
    elements = max(1, sum(tensor.numel() for tensor in tensors.values()))

    def distance(entry: Entry) -> tuple[float, int, str]:
        return abs(math.log(entry.count / count)) + abs(math.log(entry.elements / elements)), len(entry.name), entry.name

    return sorted((entry for entry in entries().values() if entry.pattern == pattern), key=distance)[:most]


def _torchvision() -> Iterator[tuple[str, int, Callable[[], nn.Module]]]:
    from torchvision import models

    for name in models.list_models(module=models, exclude=("googlenet", "inception_v3")):  # their second heads answer with a tuple in training
        size: Any = getattr(next(iter(models.get_model_weights(name))).transforms(), "crop_size", [224])
        yield name, size[0], partial(models.get_model, name, weights=None)


def _timm() -> Iterator[tuple[str, int, Callable[[], nn.Module]]]:
    import timm

    for name in timm.list_models():
        config = timm.get_pretrained_cfg(name)
        yield f"timm/{name}", config.input_size[-1] if config else 224, partial(timm.create_model, name, num_classes=1000)


def main() -> None:
    """Write the index for the installed libraries: some minutes."""
    lines = []
    for name, size, build in chain(_torchvision(), _timm()):
        try:
            state = build_on_meta(build).state_dict()
            lines.append("\t".join(map(str, (name, *digests(state), sum(tensor.numel() for tensor in state.values()), size))))
        except Exception as error:  # noqa: BLE001  # some need libraries that are not here
            sys.stderr.write(f"left out {name}: {error}\n")
    INDEX.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
