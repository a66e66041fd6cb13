"""Shaking JSON as a tree: bytes that are mutated blindly are seldom JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, 2, 7, -1, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "a", "\ud800", "\0", "x" * 600, "../x", [], {}, [[]], [0], {"": 0}, [1] * 100),
]


def shaken(text: bytes, chance: random.Random) -> bytes:
    """JSON with up to three values replaced, moved, doubled or left out."""
    tree = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        if not (slots := list(_slots(tree))):
            return json.dumps(chance.choice(STRANGE)).encode()
        (holder, key), (other, where) = chance.choice(slots), chance.choice(slots)
        match chance.randrange(4):
            case 0:
                holder[key] = copy.deepcopy(chance.choice(STRANGE))
            case 1:
                holder[key] = copy.deepcopy(other[where])
            case 2:
                del holder[key]
            case _ if isinstance(holder, list):
                holder.append(copy.deepcopy(other[where]))
            case _:
                holder[str(where)] = copy.deepcopy(other[where])
    return json.dumps(tree, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])


def shake_parts(separator: bytes) -> Callable[[bytes, random.Random], bytes]:
    def shake(data: bytes, chance: random.Random) -> bytes:
        parts = data.split(separator)
        at = chance.randrange(len(parts))
        return separator.join([*parts[:at], shaken(parts[at], chance), *parts[at + 1 :]])

    return shake


def shake_header(data: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = shaken(data[8:end], chance)
    return len(text).to_bytes(8, "little") + text + data[end:]
