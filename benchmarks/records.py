"""What was measured: one JSON object a line, a file for each suspect, below results/evaluation; what is not of a suspect and a detector alone, in lists.

Nothing else is a source of figures in README and docs, but for those of what was tried (`report/tried.py`, the decisions), which are told by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from models.lowering import has_fast_bf16

RESULTS = Path(__file__).parent / "results" / "evaluation"

Record = dict[str, Any]


def path_of(record: Record, root: Path = RESULTS) -> Path:
    return Path(root, record["dataset"], record["architecture"].replace("/", "-"), f"{record['attack']}.jsonl")


def key(record: Record) -> tuple[Any, ...]:
    """What makes a record the same cell as another."""
    return tuple(record[name] for name in ("dataset", "architecture", "attack", "suspect_seed", "detector", "seed"))


def read(root: Path = RESULTS) -> list[Record]:
    """All records."""
    return [json.loads(line) for path in sorted(root.glob("*/*/*.jsonl")) for line in path.read_text().splitlines()]


def put(record: Record, root: Path = RESULTS) -> None:
    """Write a record in place of an earlier one of its cell."""
    path = path_of(record, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path) as file:
        others = [json.loads(line) for line in file]
        records = sorted([*(other for other in others if key(other) != key(record)), record], key=lambda each: str(key(each)))
        _rewrite(file, "".join(json.dumps(each) + "\n" for each in records))


def recorded(record: Record, root: Path = RESULTS) -> Record | None:
    """What was recorded for the same cell."""
    path = path_of(record, root)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((each for each in known if key(each) == key(record)), None)


def listed(path: Path) -> list[Record]:
    """A list of records; empty where nothing was recorded yet."""
    found: list[Record] = json.loads(path.read_text()) if path.exists() else []
    return found


def enlist(path: Path, found: Sequence[Record], *names: str) -> None:
    """Write records into a list, each in place of an earlier one that says the same under `names`, by which the list is sorted."""

    def cell(record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in names)

    with _alone_in(path) as file:
        kept = {cell(each): each for each in (*json.loads(file.read() or "[]"), *found)}
        _rewrite(file, json.dumps([kept[each] for each in sorted(kept)], indent=1) + "\n")


@contextmanager
def _alone_in(path: Path) -> Iterator[TextIO]:
    """A file to read and to write anew, made where it is not there: several measurements may run at once, and none loses what another wrote."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def _rewrite(file: TextIO, text: str) -> None:
    """Given the whole text, so that what cannot be said as JSON empties no file."""
    file.truncate(0)
    file.write(text)


def circumstances(device: torch.device) -> dict[str, str]:
    """Commit and hardware of a measurement. Code that is not committed is told; suspects need not be, since a record names their weights' hash."""
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in ("benchmarks/zoo", "benchmarks/results", "docs"))):
        commit += "-dirty"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:  # what makes one CPU many times as fast as another at this
        fast = "with AMX" if torch.cpu._is_amx_tile_supported() else "with bf16" if has_fast_bf16(device) else "without bf16"
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {fast}, {os.cpu_count()} cores"
    return {"commit": commit, "hardware": f"{name}, {device.type}, torch {torch.__version__}"}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
