"""The container files, read as data: what an image is made of, what compose runs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TARGETS = ("cpu", "cuda")
START = ["badexpert", "serve", "--data-dir", "/data", "--host", "0.0.0.0", "--port", "8080"]


@dataclass(frozen=True)
class Stage:
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def dockerfile_stages() -> dict[str, Stage]:
    """Every stage by name; an instruction is its keyword and the rest of its (joined) line."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage = Stage("")
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(base)
        else:
            stage.instructions.append((keyword, rest))
    return stages


def inherited(target: str) -> list[tuple[str, str]]:
    """The instructions that make up a target's image, those of the stages it is built on first."""
    stages = dockerfile_stages()
    if target not in stages:
        return []
    return inherited(stages[target].base) + stages[target].instructions


def last(target: str, keyword: str) -> str:
    return [rest for word, rest in inherited(target) if word == keyword][-1]


def start_command(target: str) -> list[str]:
    return [*json.loads(last(target, "ENTRYPOINT")), *json.loads(last(target, "CMD"))]


def health_command(target: str) -> list[str]:
    command: list[str] = json.loads(last(target, "HEALTHCHECK").split(" CMD ", 1)[1])
    return command


def copies() -> Iterator[tuple[str, str]]:
    """(stage it is taken from or "", path) of everything that any stage copies."""
    for stage in dockerfile_stages().values():
        for keyword, rest in stage.instructions:
            if keyword == "COPY":
                words = rest.split()
                origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
                yield from ((origin, source) for source in words[:-1])


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def services() -> dict[str, Any]:
    found: dict[str, Any] = load("compose.yaml")["services"]
    return found


def in_build_context(path: str) -> bool:
    """Whether .dockerignore lets a path through: of the rules that match it or a folder above it, the last one counts."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    folders = [path, *map(str, PurePosixPath(path).parents)][:-1]
    matching = [rule for rule in rules if any(fnmatch(folder, rule.removeprefix("!")) for folder in folders)]
    return not matching or matching[-1].startswith("!")
