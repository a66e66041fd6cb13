"""Image classifiers of Hugging Face transformers: a folder's config.json -> options that were checked -> the network.

The modules are the library's own, under its own names; only the way through them is written out, block by block, so that the network can be cut
between blocks. No code that a folder brings is ever run, and what a config says of it (`auto_map`, `custom_*`) is not looked at. Dropout and
stochastic depth are left out: they matter in training alone.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.checkpoint.limits import clean_name
from models.errors import CheckpointMismatch

MOST_TOKENS = 4096  # of a transformer's input: attention costs their square
_T = TypeVar("_T")


# ---- the way through each family: network, [N, 3, H, W] -> logits [N, C]


def _resnet(network: Any, x: Any) -> Any:
    x = network.resnet.embedder(x)
    for stage in network.resnet.encoder.stages:
        for layer in stage.layers:
            x = layer(x)
    return network.classifier(network.resnet.pooler(x))


def _vit(network: Any, x: Any) -> Any:
    x = network.vit.embeddings(x)
    for layer in network.vit.layers:
        x = layer(x)
    return network.classifier(network.vit.layernorm(x)[:, 0])


def _mobilenet_v2(network: Any, x: Any) -> Any:
    x = network.mobilenet_v2.conv_stem(x)
    for layer in network.mobilenet_v2.layer:
        x = layer(x)
    return network.classifier(torch.flatten(network.mobilenet_v2.pooler(network.mobilenet_v2.conv_1x1(x)), 1))


def _convnext(network: Any, x: Any) -> Any:
    x = network.convnext.embeddings(x)
    for stage in network.convnext.encoder.stages:
        for layer in (*stage.downsampling_layer, *stage.layers):
            x = layer(x)
    return network.classifier(network.convnext.layernorm(x.mean((-2, -1))))


def _swin(network: Any, x: Any) -> Any:
    x, side = network.swin.embeddings(x)[0], _grid(network.options)  # a number, not read off x: a later block may depend on x alone
    for stage in network.swin.encoder.layers:
        for block in stage.blocks:
            x = block(x, (side, side))[0]
        if stage.downsample is not None:
            x, side = stage.downsample(x, (side, side)), (side + 1) // 2
    return network.classifier(torch.flatten(network.swin.pooler(network.swin.layernorm(x).transpose(1, 2)), 1))


class _Network(nn.Module):
    """The children of one of the library's classifiers, and a way through them."""

    def __init__(self, library: nn.Module, way: Callable[[Any, Any], Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.way, self.options = way, options
        for name, child in library.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.way(self, x)
        return logits


# ---- what a config may say


Check = Callable[[object], Any]  # an untrusted value -> the value that is kept; raises ValueError, which says what it must be


def _whole(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is refused too
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _among(*allowed: object) -> Check:
    def check(value: object) -> object:
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise ValueError(f"one of {', '.join(map(str, allowed))}")
        return value

    return check


def _per_stage(low: int, high: int) -> Check:
    def check(value: object) -> list[int]:
        if not isinstance(value, list) or not 1 <= len(value) <= 8 or not all(type(each) is int and low <= each <= high for each in value):
            raise ValueError(f"a list of 1 to 8 whole numbers from {low} to {high}")
        return list(value)

    return check


def _side(low: int, high: int) -> Check:
    def check(value: object) -> int:
        side = value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value
        if type(side) is not int or not low <= side <= high:
            raise ValueError(f"a whole number from {low} to {high}, or twice the same")
        return side

    return check


_WIDTH, _DEPTH, _SIZE, _PATCH, _EPSILON = _whole(1, 16384), _per_stage(1, 64), _side(8, 1024), _side(1, 64), _number(1e-15, 0.1)
_ACTIVATION = _among(*("relu", "relu6", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish", "hardswish", "mish", "tanh"))


@dataclass(frozen=True)
class Family:
    """One `model_type`: its class and config class in the library, and each option with the library's default and its check."""

    name: str
    config: str
    way: Callable[[Any, Any], Any]
    options: Mapping[str, tuple[Any, Check]]
    fixed: Mapping[str, Any]  # told to the library whatever the config says: what matters in training alone, and the attention that is computed


_SDPA = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "sdpa"}
FAMILIES: dict[str, Family] = {
    "resnet": Family(
        "ResNetForImageClassification",
        "ResNetConfig",
        _resnet,
        {
            "embedding_size": (64, _WIDTH),
            "hidden_sizes": ([256, 512, 1024, 2048], _per_stage(4, 16384)),
            "depths": ([3, 4, 6, 3], _DEPTH),
            "layer_type": ("bottleneck", _among("basic", "bottleneck")),
            "hidden_act": ("relu", _ACTIVATION),
            "downsample_in_first_stage": (False, _flag),
            "downsample_in_bottleneck": (False, _flag),
        },
        {},
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        _vit,
        {
            "hidden_size": (768, _WIDTH),
            "num_hidden_layers": (12, _whole(1, 128)),
            "num_attention_heads": (12, _whole(1, 128)),
            "intermediate_size": (3072, _whole(1, 65536)),
            "hidden_act": ("gelu", _ACTIVATION),
            "layer_norm_eps": (1e-12, _EPSILON),
            "image_size": (224, _SIZE),
            "patch_size": (16, _PATCH),
            "qkv_bias": (True, _flag),
        },
        _SDPA,
    ),
    "mobilenet_v2": Family(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        _mobilenet_v2,
        {
            "image_size": (224, _SIZE),
            "depth_multiplier": (1.0, _number(0.05, 8)),
            "depth_divisible_by": (8, _whole(1, 64)),
            "min_depth": (8, _whole(1, 256)),
            "expand_ratio": (6.0, _number(1, 16)),
            "output_stride": (32, _among(8, 16, 32)),
            "first_layer_is_expansion": (True, _flag),
            "finegrained_output": (True, _flag),
            "hidden_act": ("relu6", _ACTIVATION),
            "tf_padding": (True, _flag),
            "layer_norm_eps": (0.001, _EPSILON),
        },
        {},
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        _convnext,
        {
            "image_size": (224, _SIZE),
            "patch_size": (4, _PATCH),
            "num_stages": (4, _whole(1, 8)),
            "hidden_sizes": ([96, 192, 384, 768], _per_stage(1, 16384)),
            "depths": ([3, 3, 9, 3], _DEPTH),
            "hidden_act": ("gelu", _ACTIVATION),
            "layer_norm_eps": (1e-12, _EPSILON),
            "layer_scale_init_value": (1e-6, _number(0, 1)),
        },
        {"drop_path_rate": 0.0},
    ),
    "swin": Family(
        "SwinForImageClassification",
        "SwinConfig",
        _swin,
        {
            "image_size": (224, _SIZE),
            "patch_size": (4, _PATCH),
            "embed_dim": (96, _whole(1, 1024)),
            "depths": ([2, 2, 6, 2], _DEPTH),
            "num_heads": ([3, 6, 12, 24], _per_stage(1, 128)),
            "window_size": (7, _whole(1, 64)),
            "mlp_ratio": (4.0, _number(0.1, 16)),
            "qkv_bias": (True, _flag),
            "hidden_act": ("gelu", _ACTIVATION),
            "use_absolute_embeddings": (False, _flag),
            "layer_norm_eps": (1e-5, _EPSILON),
        },
        {**_SDPA, "drop_path_rate": 0.0},
    ),
}
CLASSES: tuple[str, ...] = tuple(family.name for family in FAMILIES.values())


def options_of(config: Mapping[str, object]) -> dict[str, Any]:
    """The options that decide the network's shape and function, out of an untrusted config.json; JSON goes in and out.

    Raises CheckpointMismatch for a model type that is not taken, or a value out of its range.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = f"the model type {clean_name(kind)}" if isinstance(kind, str) else "no model type"
        raise CheckpointMismatch(f"config.json states {said}; image classifiers of transformers are taken of the types {', '.join(FAMILIES)}.")
    found = {}
    try:
        for name, (default, check) in {**FAMILIES[kind].options, "num_channels": (3, _among(3))}.items():
            found[name] = check(config.get(name, default))
    except ValueError as error:
        raise CheckpointMismatch(f"{name} in config.json must be {error}.") from None
    del found["num_channels"]
    if problem := _inconsistent(kind, found, config):
        raise CheckpointMismatch(f"config.json cannot be followed: {problem}.")
    return found


def _inconsistent(kind: str, options: Mapping[str, Any], config: Mapping[str, object]) -> str | None:
    """Why values that are fine one by one make no network together, or not one that names one class an image."""
    if config.get("problem_type") not in (None, "single_label_classification"):
        return "the model is for another problem than one label an image"
    stages = len(options.get("depths", ()))
    if any(len(value) != stages for value in options.values() if isinstance(value, list)) or options.get("num_stages", stages) != stages:
        return "its lists have different lengths"
    if kind in ("vit", "swin") and not 1 <= _grid(options) ** 2 <= MOST_TOKENS:
        return f"image_size and patch_size must make 1 to {MOST_TOKENS:,} patches"
    widths = [options["embed_dim"] << stage for stage in range(stages)] if kind == "swin" else [options.get("hidden_size", 0)]
    heads = options["num_heads"] if kind == "swin" else [options.get("num_attention_heads", 1)]
    if any(width % count for width, count in zip(widths, heads, strict=True)):
        return "a width is not divided by its number of attention heads"
    if kind == "swin" and options["image_size"] % options["patch_size"]:
        return "patch_size does not divide image_size"
    if kind == "swin" and -(-_grid(options) // 2 ** (stages - 1)) < options["window_size"]:
        return "window_size is larger than the map of the last stage"
    return None


def _grid(options: Mapping[str, Any]) -> int:
    """Patches along each side."""
    return int(options["image_size"] // options["patch_size"])


def size_of(options: Mapping[str, Any]) -> int:
    """Side of the square input."""
    return int(options.get("image_size", 224))


def build(name: str, options: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The network `name`, one of CLASSES, with random weights; options as `options_of` gives them. Fit for the meta device.

    Keys and shapes of its state dict are those of the library's model of that name.
    """
    transformers: Any = importlib.import_module("transformers")  # imports for many seconds: only where such a network is wanted
    family = next(family for family in FAMILIES.values() if family.name == name)
    config = getattr(transformers, family.config)(**options, **family.fixed, num_labels=num_classes)
    return _Network(getattr(transformers, name)(config), family.way, dict(options)).eval()


# Files hold the names that the library's first versions gave; the library itself translates them when it saves and loads.
_RENAMED = (
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"\.attention\.(?:attention|self)\.(?=(?:query|key|value)\.)", ".attention."),
    (r"\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.self\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def rename(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """The tensors of a saved ViT or Swin under the names of its state dict; those of any other network as they are.

    Swin's `relative_position_index`, which follows from the window size, is left out. Raises CheckpointMismatch where two names become one.
    """
    found = {}
    for key, tensor in tensors.items():
        if re.match(r"(vit\.encoder\.layer|swin\.encoder\.layers)\.\d+\.", key):
            if key.endswith(".attention.self.relative_position_index"):
                continue
            for pattern, name in _RENAMED:
                key = re.sub(pattern, name, key)
        if key in found:
            raise CheckpointMismatch(f"The checkpoint holds two tensors for {clean_name(key)}.")
        found[key] = tensor
    return found
