"""Trained suspects, kept in half precision: DATASET/ARCHITECTURE/ATTACK.safetensors, what the attack learned beside it, and the record of how it came about."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.attacks import ATTACKS, Attack, Task
from benchmarks.data import DATASETS, Dataset
from models import architectures
from models.architectures import Architecture
from models.errors import ConfigInvalid
from models.parallel import cpu_threads

ROOT = Path(__file__).parent


@dataclass(frozen=True, order=True)
class Entry:
    """Which suspect."""

    dataset: str
    architecture: str
    attack: str
    seed: int = 0

    @property
    def stem(self) -> str:
        return f"{self.dataset}/{self.architecture.replace('/', '-')}/{self.attack}" + (f"-{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Suspect:
    """As it was kept: in float32 and eval mode, on the CPU."""

    entry: Entry
    network: nn.Module
    attack: Attack | None  # None for the clean one
    record: dict[str, Any]
    sha256: str  # of the file of weights: records of an evaluation name it

    @property
    def passes_gate(self) -> bool:
        return bool(self.record["passes_gate"])

    def take_threads(self, device: torch.device) -> None:
        """On a CPU, give this process as many threads as the service would give the network."""
        if device.type == "cpu":
            torch.set_num_threads(cpu_threads(self.network, DATASETS[self.entry.dataset].preprocessing.size))


def records(zoo: Path = ROOT) -> list[dict[str, Any]]:
    """How each suspect came about: data set by data set, the clean network first, then the attacks in the order of their list."""
    found = [json.loads(path.read_text()) for path in zoo.glob("*/*/*.json")]
    order = ["clean", *ATTACKS]
    return sorted(found, key=lambda record: (record["dataset"], record["architecture"], order.index(record["attack"]), record["seed"]))


def entries(zoo: Path = ROOT) -> list[Entry]:
    """Those whose weights are there, in the same order; of the full scale git has the records alone."""
    found = [Entry(record["dataset"], record["architecture"], record["attack"], record["seed"]) for record in records(zoo)]
    return [entry for entry in found if (zoo / f"{entry.stem}.safetensors").exists()]


class Enlarge(nn.Module):
    """Images at the size that a network insists on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return interpolate(images, (self.size, self.size), mode="bilinear")


def build(architecture: str, dataset: Dataset) -> nn.Module:
    """With random weights, for images of the data set's size; NAME@SIZE gets them enlarged to another, as BackdoorBench does it.

    A network that takes no other size than its own gets them enlarged to that.
    """
    name, _, size = architecture.partition("@")
    known = architectures.get(name)
    if size:
        return nn.Sequential(Enlarge(int(size)), _resized(name, int(size)).build(dataset.num_classes))
    network = known.build(dataset.num_classes)
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, dataset.preprocessing.size, dataset.preprocessing.size))
    except (AssertionError, RuntimeError):
        network = nn.Sequential(Enlarge(known.size), network)
    return network


def _resized(name: str, size: int) -> Architecture:
    """The architecture for images of another size: transformers are built for one, other networks take any."""
    try:
        resized = architectures.get(name, {"img_size": size})
        resized.build(2)
        return resized
    except ConfigInvalid:
        return architectures.get(name)


def load(entry: Entry, zoo: Path = ROOT) -> Suspect:
    """Raises FileNotFoundError for one that is not kept."""
    path = zoo / f"{entry.stem}.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: python -m benchmarks.train --dataset {entry.dataset} --architecture {entry.architecture} --attack {entry.attack}"
        )
    dataset = DATASETS[entry.dataset]
    network = build(entry.architecture, dataset)
    network.load_state_dict(_wide(load_file(path)))
    attack = None
    if entry.attack != "clean":
        attack = ATTACKS[entry.attack](Task(dataset.num_classes, dataset.preprocessing.size, dataset.target), entry.seed)
        if (learned := path.with_suffix(".trigger.safetensors")).exists():
            attack.load_state_dict(_wide(load_file(learned)))
        attack.eval().requires_grad_(False)
    record = path.with_suffix(".json")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Suspect(entry, network.eval(), attack, json.loads(record.read_text()) if record.exists() else {}, sha256)


def keep(entry: Entry, network: nn.Module, attack: Attack | None, zoo: Path = ROOT, record: dict[str, Any] | None = None) -> None:
    """Write weights and what the attack learned, in half precision, and the record where there is one."""
    path = zoo / f"{entry.stem}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_half(network.state_dict()), path)
    if attack is not None and attack.state_dict():
        save_file(_half(attack.state_dict()), path.with_suffix(".trigger.safetensors"))
    if record is not None:
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous() for name, value in state.items()}


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
