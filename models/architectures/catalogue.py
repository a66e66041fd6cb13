"""Names -> networks. Networks are built with random weights and never from a hub.

Names: `resnet20` ... of the CIFAR family, `resnet50` ... of torchvision, `timm/NAME`, `transformers/CLASS` (with the options that its config
gives), and the operator's own: what an installed package registers in the entry-point group `badexpert.architectures`, and
`package.module:factory`, which is known only once `admit` was called with it: from a command line or from settings, never from a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from torch import nn

from models import cifar
from models.architectures import huggingface
from models.architectures.index import entries
from models.architectures.meta import build_on_meta
from models.errors import CheckpointMismatch, ConfigInvalid
from models.preprocessing import Preprocessing

ENTRY_POINTS = "badexpert.architectures"
# A class count that no layer has by chance: tensors that carry it are the head, and tell the class count of a checkpoint.
PROBE_CLASSES = 7919

Factory = Callable[[int], nn.Module]
_admitted: dict[str, Factory] = {}


@dataclass(frozen=True)
class Architecture:
    """A network by name: `build(num_classes)` gives it with random weights; `size` is the usual side of its square input."""

    name: str
    build: Factory = field(compare=False)
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)  # what `build` was made from beside the name; as JSON

    @property
    def library(self) -> str:
        """timm, transformers, torchvision, cifar (ours), or own (the operator's)."""
        library, slash, _ = self.name.partition("/")
        if slash:
            return library
        return "cifar" if self.name in cifar.NETWORKS else "torchvision" if self.name in entries() else "own"

    @property
    def short_name(self) -> str:
        """The name within its library."""
        return self.name.rpartition("/")[2]

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        """What the library's own weights for this network are used with, at this network's input size; None where it publishes none."""
        if self.library == "timm":
            return _timm_preprocessing(self.short_name, self.size)
        return _torchvision_preprocessing(self.short_name, self.size) if self.library == "torchvision" else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The state dict's keys and shapes with PROBE_CLASSES classes, found without memory for the weights."""
        network = build_on_meta(lambda: self.build(PROBE_CLASSES))
        return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def resolve(name: str) -> list[str]:
    """The full names that a user may mean by `name`: itself, or that name in any library. Raises ConfigInvalid where there is none.

    Imports nothing of the libraries, so that a server can judge a request by it.
    """
    if name in cifar.NETWORKS or name in _own():
        return [name]
    found = [full for full in (name, f"timm/{name}") if full in entries()]
    found += [full for family in huggingface.CLASSES if (full := f"transformers/{family}") in (name, f"transformers/{name}")]
    if not found:
        raise ConfigInvalid(
            f"There is no such architecture. Known are {', '.join(cifar.NETWORKS)}, the classification networks of torchvision (resnet18, ...), "
            "timm/NAME for those of timm, transformers/CLASS for Hugging Face folders, and what the operator of this server has registered."
        )
    return found


@cache
def _get(name: str) -> Architecture:
    return _make(name, {})


def get(name: str, options: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of this full name. Raises ConfigInvalid where there is none, or where it is not installed here."""
    return _make(name, options) if options else _get(name)


def _make(name: str, options: Mapping[str, Any]) -> Architecture:
    if name in cifar.NETWORKS:
        return Architecture(name, cifar.NETWORKS[name], 32)
    if name in _own():
        factory = _loaded(name, _own()[name])
        return Architecture(name, partial(_built, name, factory), getattr(factory, "input_size", 224))
    library, _, short = name.rpartition("/")
    if library == "transformers":
        if not options:
            raise CheckpointMismatch("A network of transformers is known by its config.json: pack it together with the weights (a folder, or a zip of it).")
        return Architecture(name, partial(huggingface.build, short, options), huggingface.size_of(options), options)
    if name not in resolve(name):
        raise ConfigInvalid(f"{name} is no full name; say {' or '.join(resolve(name))}.")
    size = options.get("img_size", options.get("image_size", entries()[name].size))
    return Architecture(name, partial(_timm if library else _torchvision, short, options), size, options)


def _torchvision(name: str, options: Mapping[str, Any], num_classes: int) -> nn.Module:
    from torchvision.models import get_model  # imports for seconds: not where only a CIFAR network is wanted

    # Two families have a second head for training; it is part of their state dict, and makes them answer with a tuple in training mode only.
    network: nn.Module = get_model(name, weights=None, num_classes=num_classes, **options)
    return network


def _torchvision_preprocessing(name: str, size: int) -> Preprocessing | None:
    from torchvision.models import get_model_weights

    weights: Any = next(iter(get_model_weights(name)), None)
    if weights is None:
        return None
    used = weights.transforms()
    resize = round(size * used.resize_size[0] / used.crop_size[0])
    return Preprocessing(size, resize, used.interpolation.value, mean=tuple(used.mean), std=tuple(used.std))


def _timm_preprocessing(name: str, size: int) -> Preprocessing | None:
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None:
        return None
    how: Literal["bilinear", "bicubic"] = "bilinear" if config.interpolation == "bilinear" else "bicubic"
    aspect: Literal["keep", "stretch"] = "stretch" if config.crop_mode == "squash" else "keep"
    return Preprocessing(size, math.floor(size / config.crop_pct), how, mean=tuple(config.mean), std=tuple(config.std), aspect=aspect)


def _timm(name: str, options: Mapping[str, Any], num_classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):  # a name with a colon would be looked up on a hub
        raise ConfigInvalid(f"timm {timm.__version__}, which is installed here, has no {name}.")
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not options:
            raise
        raise ConfigInvalid(f"timm cannot build {name} with {', '.join(options)} as stated.") from error
    return network


# ---- the operator's own


def admit(reference: str) -> str:
    """Make `package.module:factory` known under this very name. It imports, so never call it with what came in a request.

    `factory(num_classes)` returns an nn.Module from float [N, 3, S, S] to logits [N, num_classes]; its attribute `input_size`, if it has one,
    is S, otherwise 224. Raises ConfigInvalid where it cannot be imported, or builds no network.
    """
    module, colon, attribute = reference.partition(":")
    if not colon or not module or not attribute:
        raise ConfigInvalid("An own architecture is written package.module:factory.")
    factory = _loaded(reference, EntryPoint(attribute, reference, ENTRY_POINTS).load)
    build_on_meta(lambda: _built(reference, factory, PROBE_CLASSES))
    _admitted[reference] = factory
    return reference


def own() -> Iterator[str]:
    """The names of all architectures of the operator's."""
    return iter(_own())


def _loaded(name: str, load: Callable[[], Any]) -> Factory:
    """Runs what the operator wrote, which may raise anything."""
    try:
        factory = load()
    except (Exception, SystemExit) as error:
        raise ConfigInvalid(f"The architecture {name} cannot be imported: {_said(error)}. It must lie in an installed package or on PYTHONPATH.") from error
    if not callable(factory):
        raise ConfigInvalid(f"The architecture {name} is no function of a class count.")
    made: Factory = factory
    return made


def _built(name: str, factory: Factory, num_classes: int) -> nn.Module:
    try:
        network: Any = factory(num_classes)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigInvalid(f"The architecture {name} cannot be built for {num_classes} classes: {_said(error)}.") from error
    if not isinstance(network, nn.Module):
        raise ConfigInvalid(f"The architecture {name} is a function that gives {type(network).__name__}, not a torch.nn.Module.")
    return network


def _said(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": .")


def _own() -> dict[str, Callable[[], Factory]]:
    registered: dict[str, Callable[[], Factory]] = {point.name: point.load for point in _installed()}
    return {**registered, **{name: partial(_admitted.__getitem__, name) for name in _admitted}}


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))
