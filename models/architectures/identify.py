"""Which architecture a state dict belongs to, by exact keys and shapes; the class count is read off the head.

Several names may fit. Those that compute the same from these weights are one; those that do not are told apart by the caller, who may have clean
images, or named by the user.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import cifar
from models.architectures.catalogue import PROBE_CLASSES, Architecture, get, own, resolve
from models.architectures.index import resembling, with_keys
from models.architectures.meta import build_on_meta
from models.checkpoint.state_dict import unwrapped
from models.errors import CheckpointMismatch, ConfigInvalid

RESEMBLING = 6  # networks that are compared only to say how close they come
SAME = 1e-4  # relative difference of logits below which two networks compute the same


@dataclass(frozen=True)
class Fit:
    """How a state dict fits an architecture: the class count if it fits, and the differing keys if not."""

    architecture: Architecture
    num_classes: int | None
    differing: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.num_classes is not None and not self.differing


@dataclass(frozen=True)
class Match:
    """An exact fit, and the names of others that compute the same."""

    fit: Fit
    equivalent: tuple[str, ...] = ()


def as_named(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint under an architecture's names. Of theirs those of wrappers were stripped, with which an architecture's own may begin."""
    inner, wrappers = unwrapped(list(architecture.shapes))
    if not wrappers or tensors.keys() <= architecture.shapes.keys():
        return tensors
    names = dict(zip(inner, architecture.shapes, strict=True))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def fit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
    """Compare a state dict with an architecture."""
    tensors = as_named(architecture, tensors)
    counts, differing = set[int](), []
    for key, shape in architecture.shapes.items():
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):
                differing.append(f"{key} is missing")
            continue
        found = tuple(tensors[key].shape)
        head = [axis for axis, size in enumerate(shape) if size == PROBE_CLASSES]
        if len(found) == len(shape) and all(found[axis] == size for axis, size in enumerate(shape) if axis not in head):
            counts.update(found[axis] for axis in head)
        else:
            wanted = "x".join("classes" if axis in head else str(size) for axis, size in enumerate(shape))
            differing.append(f"{key} is {'x'.join(map(str, found))}, not {wanted}")
    differing += [f"{key} is unknown" for key in tensors if key not in architecture.shapes]
    if len(counts) > 1:
        differing.append(f"the head's tensors disagree on the class count ({', '.join(map(str, sorted(counts)))})")
    return Fit(architecture, counts.pop() if len(counts) == 1 else None, tuple(differing))


def identify(tensors: Mapping[str, Tensor], name: str | None = None, claimed: Architecture | None = None) -> list[Match]:
    """The architectures that these float32 weights fit exactly, one for each function that they may compute; the likeliest first.

    `name` is what the user says and must fit; `claimed` is what a file beside the weights says, and is believed where it fits.
    Raises CheckpointMismatch, which says what was tried, how close it came, and at most five differing keys.
    """
    if name is not None:
        named = [get(full) for full in resolve(name)] if claimed is None or name not in (claimed.name, claimed.short_name) else [claimed]
        tried = [fitted(candidate, tensors) for candidate in named]
        exact = [candidate for candidate in tried if candidate.exact]
        if not exact:
            closest = min(tried, key=_distance)
            raise CheckpointMismatch(f"The checkpoint does not fit {closest.architecture.name}: {_some(closest.differing)}.")
        return [Match(exact[0])]
    tried = [] if claimed is None else [fit(claimed, tensors)]
    if tried and tried[0].exact:
        return [Match(tried[0])]
    for family in _families(tensors):
        found = [fitted(candidate, tensors) for candidate in family]
        tried += found
        if exact := [candidate for candidate in found if candidate.exact]:
            return _distinct(exact, tensors)
    raise CheckpointMismatch(_nothing_fits(tried, tensors))


def fitted(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
    """`fit`, with the input size of a transformer read off its position embedding where that alone differs."""
    result = fit(architecture, tensors)
    keys = [item.partition(" is ")[0] for item in result.differing]
    if len(keys) != 1 or "pos_embed" not in keys[0] or keys[0] not in tensors:
        return result
    size = _input_size(architecture, architecture.shapes[keys[0]], tuple(tensors[keys[0]].shape))
    if size is None:
        return result
    option = "img_size" if architecture.library == "timm" else "image_size"
    return fit(get(architecture.name, {**architecture.options, option: size}), tensors)


def _input_size(architecture: Architecture, usual: tuple[int, ...], found: tuple[int, ...]) -> int | None:
    """Both are [1, tokens, D], the tokens a square grid of patches behind a class token or a few."""
    if len(usual) != 3 or len(found) != 3 or (usual[0], usual[2]) != (found[0], found[2]):
        return None
    side = math.isqrt(usual[1])
    patches = found[1] - (usual[1] - side**2)
    grid = math.isqrt(max(patches, 0))
    size, rest = divmod(architecture.size * grid, side)
    return size if grid and grid**2 == patches and not rest else None


def _families(tensors: Mapping[str, Tensor]) -> Iterator[Sequence[Architecture]]:
    """Candidates in the order in which they are asked; a family with an exact fit ends the search."""
    yield list(_available(own()))
    yield [get(name) for name in cifar.NETWORKS]
    # Short names first: what is called `vit_tiny_patch16_224` is better known than others that are the same network.
    entries = sorted(with_keys(tensors), key=lambda entry: ("/" in entry.name, len(entry.name), entry.name))
    yield list(_available(entry.name for entry in entries))


def _available(names: Iterator[str]) -> Iterator[Architecture]:
    for name in names:
        try:
            architecture = get(name)
            architecture.shapes  # noqa: B018  # builds it: the installed library may not have it any more
        except ConfigInvalid:
            continue
        yield architecture


def _distinct(exact: Sequence[Fit], tensors: Mapping[str, Tensor]) -> list[Match]:
    """One match for each different function: the candidates are run on one input with these very weights."""
    if len(exact) == 1:
        return [Match(exact[0])]
    groups: list[tuple[Fit, list[str], Tensor]] = []
    for candidate in exact:
        logits = _logits(candidate, tensors)
        same = next((names for _, names, other in groups if torch.allclose(logits, other, rtol=SAME, atol=SAME * float(other.abs().max()))), None)
        if same is None:
            groups.append((candidate, [], logits))
        else:
            same.append(candidate.architecture.name)
    return [Match(first, tuple(names)) for first, names, _ in groups]


@torch.inference_mode()
def _logits(candidate: Fit, tensors: Mapping[str, Tensor]) -> Tensor:
    size = candidate.architecture.size
    generator = torch.Generator().manual_seed(0)
    network = instantiate(candidate.architecture, candidate.num_classes or 0, tensors)
    logits: Tensor = network(torch.randn(1, 3, size, size, generator=generator))
    return logits


def instantiate(architecture: Architecture, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network with these float32 weights, in eval mode, in channels-last layout on the CPU. It shares no memory with `tensors`."""
    network = build_on_meta(lambda: architecture.build(num_classes))
    # Some buffers are not in the state dict (position indices of attention windows): those must be computed, so build on the CPU then.
    state = dict(as_named(architecture, tensors))
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros(value.shape, dtype=value.dtype))
    if any(key not in state and value.is_meta for key, value in network.named_buffers()):
        network = architecture.build(num_classes)
    network.load_state_dict({key: value.clone() for key, value in state.items()}, strict=True, assign=True)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network.eval().to(memory_format=torch.channels_last)


# ---- what is said where nothing fits


def _nothing_fits(tried: list[Fit], tensors: Mapping[str, Tensor]) -> str:
    known = {candidate.architecture.name for candidate in tried}
    nearby = [name for entry in resembling(tensors, RESEMBLING) if (name := entry.name) not in known]
    tried += [fit(architecture, tensors) for architecture in _available(iter(nearby))]
    closest = sorted(tried, key=_distance)
    near = ", ".join(f"{each.architecture.name} ({len(each.differing)} of {len(each.architecture.shapes)} keys differ)" for each in closest[:3])
    return (
        f"The checkpoint fits no known architecture: {len(cifar.NETWORKS)} CIFAR networks, torchvision's, timm's and the operator's own were compared by "
        f"key and shape. Closest: {near}. Of {closest[0].architecture.name}: {_some(closest[0].differing)}. If it is a network of your own, name "
        "its code on the command line with `--architecture package.module:factory`."
    )


def _distance(candidate: Fit) -> tuple[float, str]:
    return len(candidate.differing) / len(candidate.architecture.shapes), candidate.architecture.name


def _some(differing: tuple[str, ...], limit: int = 5) -> str:
    clean = ["".join(letter if letter.isprintable() else "?" for letter in item)[:100] for item in differing[:limit]]
    rest = len(differing) - len(clean)
    return "; ".join(clean) + (f"; and {rest} more" if rest > 0 else "")
