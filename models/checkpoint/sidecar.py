"""The small JSON files beside the weights -> what they claim: config.json of timm or transformers, and preprocessor_config.json.

All of it is hearsay of an untrusted file: values are checked and bounded, nothing is imported or run by a name that stands in them, and what cannot
be followed is noted. What these files mean is read off timm.data (`resolve_data_config`, `transforms_imagenet_eval`) and transformers' image processors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.checkpoint.limits import clean_name, listed
from models.checkpoint.strict_json import parse
from models.errors import CheckpointInvalid, CheckpointMismatch
from models.preprocessing import Preprocessing

MOST_BYTES = 4 << 20  # the names of ImageNet-22k, twice over as transformers writes them, are 2 MiB
MOST_NAMES, NAME_LENGTH = 100_000, 200
SIDES, WIDEST = range(8, 1025), 2048  # of the input; of the shorter side of an image before the centre is cropped

Triple = tuple[float, float, float]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Sidecar:
    """What the files beside a checkpoint claim."""

    kind: str  # "timm" or "transformers"
    architecture: str  # "timm/resnet18", "transformers/ViTForImageClassification"
    options: dict[str, Any]  # what the network is built from beside the class count; checked, and JSON
    num_classes: int | None
    preprocessing: Preprocessing | None  # None where it is not stated, or cannot be expressed
    classes: tuple[str, ...] | None  # their names in the order of the outputs; None where they are missing or odd
    notes: tuple[str, ...]  # what was left aside, in plain sentences


def read_sidecar(config: bytes, preprocessor: bytes | None = None) -> Sidecar | None:
    """None for a config.json that is neither timm's nor transformers'.

    Raises CheckpointInvalid for JSON that is damaged, CheckpointMismatch for a network that is not taken.
    """
    match strict_json(config, "config.json"):
        case {"architecture": str(), "pretrained_cfg": dict()} | {"architecture": str(), "model_type": "timm_wrapper"} as claims:
            return _timm(claims)
        case {"architecture": str(), "input_size": list(), "mean": list(), "std": list()} as claims:  # as timm wrote it before 2023
            return _timm({**claims, "pretrained_cfg": claims})
        case {"model_type": str(), "architectures": _} | {"model_type": str(), "transformers_version": _} as claims:
            return _transformers(claims, {} if preprocessor is None else strict_json(preprocessor, "preprocessor_config.json"))
    return None


def strict_json(data: bytes, name: str) -> Any:
    """Untrusted JSON of the file `name`; raises CheckpointInvalid where it is too large, damaged, or says a thing twice."""
    if len(data) > MOST_BYTES:
        raise CheckpointInvalid(f"{name} is larger than {MOST_BYTES:,} bytes.")
    try:
        return parse(data)
    except ValueError as error:
        raise CheckpointInvalid(f"{name} is not strict JSON.") from error


# ---- timm

_POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "token", "map")
_ASPECTS: dict[str, Literal["keep", "stretch"]] = {"center": "keep", "squash": "stretch"}
_INTERPOLATIONS: dict[str, Interpolation] = {"nearest": "nearest", "bilinear": "bilinear", "bicubic": "bicubic"}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _timm(claims: Mapping[str, Any]) -> Sidecar:
    name = claims["architecture"]
    if not re.fullmatch(r"[a-z0-9_]{1,100}", name):
        raise CheckpointMismatch(f"config.json names the architecture {clean_name(name)}, which is no name of a network of timm.")
    notes: list[str] = []
    trained = claims.get("pretrained_cfg")
    trained = trained if isinstance(trained, dict) else {}
    match trained.get("input_size"):
        case [3, int(height), int(width)] if height == width and height in SIDES:
            side: int | None = height
        case _:
            side = None
    options: dict[str, Any] = {"img_size": side} if trained.get("fixed_input_size") is True and side else {}
    arguments, left = claims.get("model_args"), []
    for key, value in arguments.items() if isinstance(arguments, dict) else ():
        match key, value:
            case ("img_size", int(size)) | ("img_size", [int(size), _]) if size in SIDES and value in (size, [size, size]):
                options["img_size"] = size
            case "global_pool", str() if value in _POOLS:
                options["global_pool"] = value
            case ("in_chans", 3) | ("num_classes", int()) | (_, None):
                pass
            case _:
                left.append(key)
    if left:
        notes.append(f"Arguments in config.json were not followed: {listed(left)}.")
    num_classes = _count(claims.get("num_classes", trained.get("num_classes")))
    names = claims.get("label_names", claims.get("labels", trained.get("label_names")))
    preprocessing = _followed(lambda: _timm_preprocessing(trained, side), notes) if trained else None
    return Sidecar("timm", f"timm/{name}", options, num_classes, preprocessing, _names(names, num_classes, notes), tuple(notes))


def _timm_preprocessing(trained: Mapping[str, Any], side: int | None) -> Preprocessing:
    """What timm evaluates with; its own defaults where nothing is said."""
    stated = {key: value for key, value in trained.items() if value is not None}
    aspect = _ASPECTS.get(_word(stated.get("crop_mode", "center")))
    if side is None or aspect is None:
        raise ValueError("its input is not square, or images are padded")
    mean, std = _triple(stated.get("mean", _IMAGENET[0])), _triple(stated.get("std", _IMAGENET[1]))
    interpolation = _INTERPOLATIONS.get(_word(stated.get("interpolation", "bicubic")))
    return _preprocessing(side, math.floor(side / _share(stated.get("crop_pct", 0.875))), interpolation, mean, std, "unit", aspect)


# ---- transformers


@dataclass(frozen=True)
class _Processor:
    """The defaults of an image processor; a `size` that is a number alone means both sides where `square` is set, else the shorter one."""

    size: int
    square: bool
    resample: int  # Pillow's number
    normalisation: tuple[Triple, Triple]
    crop: int | None = None


_PROCESSORS = {
    "ViT": _Processor(224, True, 2, _HALF),
    "DeiT": _Processor(256, True, 3, _HALF, 224),
    "ConvNext": _Processor(384, False, 3, _HALF),
    "MobileNetV1": _Processor(256, False, 2, _HALF, 224),
    "MobileNetV2": _Processor(256, False, 2, _HALF, 224),
    "Bit": _Processor(224, False, 3, _OPENAI, 224),
    "CLIP": _Processor(224, False, 3, _OPENAI, 224),
}
_USUAL = {"vit": "ViT", "swin": "ViT", "resnet": "ConvNext", "convnext": "ConvNext", "mobilenet_v2": "MobileNetV2"}
_RESAMPLE: dict[float, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_CONVNEXT_STRETCHES = 384  # images for networks of this side and larger are stretched, those for smaller ones are cropped


def _transformers(claims: Mapping[str, Any], preprocessor: object) -> Sidecar:
    from models.architectures import huggingface  # here, since models.architectures is made from this package

    options = huggingface.options_of(claims)
    notes: list[str] = []
    name = huggingface.FAMILIES[claims["model_type"]].name
    match claims.get("architectures"):
        case [str(first), *_] as stated if name not in stated:
            notes.append(f"config.json says that the weights are those of a {clean_name(first)}, not of a {name}.")
    labels = claims.get("id2label")
    num_classes = _count(len(labels) if isinstance(labels, dict) else claims.get("num_labels"))
    usual = _USUAL[claims["model_type"]]
    followed = _followed(lambda: _transformers_preprocessing(preprocessor, usual), notes) if isinstance(preprocessor, dict) and preprocessor else None
    return Sidecar("transformers", f"transformers/{name}", options, num_classes, followed, _names(labels, num_classes, notes), tuple(notes))


def _transformers_preprocessing(claims: Mapping[str, Any], usual: str) -> Preprocessing:
    """What the image processor that is named does, or the usual one of the family; its defaults where nothing is said."""
    stated = {key: value for key, value in claims.items() if value is not None}
    kind = _word(stated.get("image_processor_type", stated.get("feature_extractor_type", f"{usual}ImageProcessor")))
    found = re.fullmatch(r"(\w+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)", kind)
    if found is None or found[1] not in _PROCESSORS:
        raise ValueError(f"it is that of a {clean_name(kind)}")
    default = _PROCESSORS[found[1]]
    if stated.get("do_resize", True) is not True:
        raise ValueError("images are not resized")
    edge, stretch = _edge(stated.get("size", default.size), default.square)
    side, resize = edge if stretch else None, edge
    if found[1] == "ConvNext":
        side, stretch = edge, edge >= _CONVNEXT_STRETCHES
        resize = edge if stretch else int(edge / _share(stated.get("crop_pct", 0.875)))
    if stated.get("do_center_crop", default.crop is not None) is True:
        crop, _ = _edge(stated.get("crop_size", default.crop), True)
        if crop > (side or crop):
            raise ValueError("images are padded")
        side = crop
    if side is None:
        raise ValueError("images keep their shape, and are not square")
    mean, std = (_triple(stated.get(key, usual)) for key, usual in zip(("image_mean", "image_std"), default.normalisation, strict=True))
    if stated.get("do_normalize", True) is not True:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = _number(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) is True else 1.0
    if factor != 1 and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError("pixels are scaled to neither 1 nor 255")
    interpolation = _RESAMPLE.get(_number(stated.get("resample", default.resample)))
    return _preprocessing(side, resize, interpolation, mean, std, "byte" if factor == 1 else "unit", "stretch" if stretch else "keep")


def _edge(size: object, square: bool) -> tuple[int, bool]:
    """The side that images are resized to, and whether both sides are."""
    match size:
        case int(edge):
            pass
        case {"shortest_edge": int(edge), **rest} if not rest:
            square = False
        case {"height": int(edge), "width": int(width), **rest} if width == edge and not rest:
            square = True
        case _:
            edge = 0
    if not SIDES[0] <= edge <= WIDEST:
        raise ValueError("its size is not one that is taken")
    return edge, square


# ---- both


def _followed(make: Callable[[], Preprocessing], notes: list[str]) -> Preprocessing | None:
    try:
        return make()
    except ValueError as error:
        notes.append(f"The preprocessing that is stated beside the weights cannot be followed: {error}.")
        return None


def _preprocessing(
    side: int,
    resize: int,
    interpolation: Interpolation | None,
    mean: Triple,
    std: Triple,
    scale: Literal["unit", "byte"],
    aspect: Literal["keep", "stretch"],
) -> Preprocessing:
    if side not in SIDES or not side <= resize <= WIDEST:
        raise ValueError("its size is not one that is taken")
    if interpolation is None:
        raise ValueError("its interpolation is not one of nearest, bilinear, bicubic")
    if min(std) < 1e-6:
        raise ValueError("a standard deviation is not positive")
    return Preprocessing(side, resize, interpolation, "rgb", scale, mean, std, aspect)


def _names(stated: object, count: int | None, notes: list[str]) -> tuple[str, ...] | None:
    """Class names out of a list, or an object from "0", "1", ... to them; a library's `LABEL_0` names nothing."""
    if isinstance(stated, dict):
        stated = [stated.get(str(index)) for index in range(len(stated))] if len(stated) <= MOST_NAMES else None
    elif stated is None:
        return None
    names = stated if isinstance(stated, list) and len(stated) == count else []
    if not names or not all(isinstance(name, str) and 0 < len(name) <= NAME_LENGTH and name.isprintable() for name in names):
        notes.append("The class names in config.json are incomplete or odd, and were left aside.")
        return None
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else tuple(names)


def _count(value: object) -> int | None:
    return value if type(value) is int and 1 <= value <= MOST_NAMES else None


def _word(value: object) -> str:
    return value if isinstance(value, str) else "?"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ValueError("it has other things where numbers belong")
    return float(value)


def _share(value: object) -> float:
    if not 0.1 <= (share := _number(value)) <= 1:
        raise ValueError("its crop_pct is not between 0.1 and 1")
    return share


def _triple(value: object) -> Triple:
    """Three numbers, or one for all three channels."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3:
        raise ValueError("it is not for three channels")
    red, green, blue = map(_number, numbers)
    return red, green, blue
