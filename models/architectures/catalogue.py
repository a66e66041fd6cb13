"""Names -> networks, and which of them fits a state dict.

Networks are built with random weights and never from a hub. Which one a checkpoint belongs to is decided by exact keys and shapes, on the meta
device, so that looking costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from models import cifar
from models.errors import CheckpointMismatch, ConfigInvalid

# A class count that no layer has by chance: tensors that carry it are the head, and tell the class count of a checkpoint.
_PROBE_CLASSES = 7919


@dataclass(frozen=True)
class Architecture:
    """A network by name: `build(num_classes)` gives it with random weights; `size` is the side of the square input it is trained on."""

    name: str
    build: Callable[[int], nn.Module]
    size: int


def _torchvision(name: str) -> Architecture:
    def build(num_classes: int) -> nn.Module:
        from torchvision.models import get_model  # imports for seconds: not where only a CIFAR network is wanted

        network: nn.Module = get_model(name, weights=None, num_classes=num_classes)
        return network

    return Architecture(name, build, 224)


# By family: keys differ between families, so that the first family with a fit decides.
_FAMILIES: tuple[tuple[Architecture, ...], ...] = (
    (
        *(Architecture(f"resnet{depth}", partial(cifar.thin_resnet, depth), 32) for depth in (20, 32, 44, 56)),
        Architecture("resnet18_cifar", cifar.resnet18, 32),
    ),
    tuple(map(_torchvision, ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "vit_b_16"))),
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for family in _FAMILIES for architecture in family}


def get(name: str) -> Architecture:
    """The architecture of this name; raises ConfigInvalid, naming those there are."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ConfigInvalid(f"There is no such architecture; known are: {', '.join(ARCHITECTURES)}.") from None


@dataclass(frozen=True)
class Fit:
    """How a state dict fits an architecture: the class count if it fits, and the differing keys if not."""

    architecture: Architecture
    num_classes: int | None
    differing: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.num_classes is not None and not self.differing


@cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = ARCHITECTURES[name].build(_PROBE_CLASSES)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def fit(name: str, tensors: Mapping[str, Tensor]) -> Fit:
    """Compare a state dict with an architecture; the class count is read off the head."""
    expected, counts, differing = _shapes(name), set[int](), []
    for key, shape in expected.items():
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):
                differing.append(f"{key} is missing")
            continue
        found = tuple(tensors[key].shape)
        head = [axis for axis, size in enumerate(shape) if size == _PROBE_CLASSES]
        if len(found) == len(shape) and all(found[axis] == size for axis, size in enumerate(shape) if axis not in head):
            counts.update(found[axis] for axis in head)
        else:
            wanted = "x".join("classes" if axis in head else str(size) for axis, size in enumerate(shape))
            differing.append(f"{key} is {'x'.join(map(str, found))}, not {wanted}")
    differing += [f"{key} is unknown" for key in tensors if key not in expected]
    if len(counts) > 1:
        differing.append(f"the head's tensors disagree on the class count ({', '.join(map(str, sorted(counts)))})")
    return Fit(ARCHITECTURES[name], counts.pop() if len(counts) == 1 else None, tuple(differing))


def identify(tensors: Mapping[str, Tensor], name: str | None = None) -> Fit:
    """The architecture that a state dict belongs to, or a check that it belongs to `name`.

    Raises CheckpointMismatch with at most five differing keys of the closest candidate.
    """
    if name is not None:
        result = fit(get(name).name, tensors)
        if not result.exact:
            raise CheckpointMismatch(f"The checkpoint does not fit {name}: {_some(result.differing)}.")
        return result
    fits: list[Fit] = []
    exact: list[Fit] = []
    for family in _FAMILIES:
        fits += [fit(architecture.name, tensors) for architecture in family]
        exact = [candidate for candidate in fits if candidate.exact]
        if exact:
            break
    if not exact:
        closest = min(fits, key=lambda candidate: len(candidate.differing))
        raise CheckpointMismatch(
            f"The checkpoint fits none of {', '.join(ARCHITECTURES)}. Closest is {closest.architecture.name}: {_some(closest.differing)}. "
            "Name the architecture with `architecture` if it is one of these."
        )
    if len(exact) > 1:
        names = ", ".join(candidate.architecture.name for candidate in exact)
        raise CheckpointMismatch(f"The checkpoint fits several architectures ({names}); name the right one with `architecture`.")
    return exact[0]


def _some(differing: tuple[str, ...], limit: int = 5) -> str:
    clean = ["".join(letter if letter.isprintable() else "?" for letter in item)[:100] for item in differing[:limit]]
    rest = len(differing) - len(clean)
    return "; ".join(clean) + (f"; and {rest} more" if rest > 0 else "")


def instantiate(name: str, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network with these float32 weights, in eval mode, in channels-last layout on the CPU."""
    with torch.device("meta"):
        network = get(name).build(num_classes)
    # Some buffers are not in the state dict (position indices of attention windows): those must be computed, so build on the CPU then.
    state = dict(tensors)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros(value.shape, dtype=value.dtype))
    if any(key not in state for key, _ in network.named_buffers()):
        network = get(name).build(num_classes)
    network.load_state_dict({key: value.clone() for key, value in state.items()}, strict=True, assign=True)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network.eval().to(memory_format=torch.channels_last)
