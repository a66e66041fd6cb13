"""Files that timm and transformers write, read back; what they claim gives the very pixels that the libraries give; hostile ones are refused or noted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given
from PIL import Image
from timm.models._hub import save_config_for_hf

from models.architectures import huggingface
from models.checkpoint.sidecar import MOST_BYTES, Sidecar, read_sidecar, strict_json
from models.errors import CheckpointInvalid, CheckpointMismatch, CheckpointProblem
from models.preprocessing import Preprocessing

SIZES = ((32, 32), (97, 61), (60, 401), (640, 480))


def images() -> Iterator[Image.Image]:
    """Smooth ones: neighbouring pixels differ little, so that a shift by half a pixel is not taken for another resize."""
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width] / max(width, height)
        pixels = np.stack([np.sin(5 * x + y), np.cos(4 * y * x), np.sin(7 * y)], axis=-1) * 127.5 + 127.5
        yield Image.fromarray(pixels.astype(np.uint8))


def ours(preprocessing: Preprocessing | None, image: Image.Image) -> torch.Tensor:
    assert preprocessing is not None
    return preprocessing.normalise(preprocessing.pixels(image)[None])[0]


def read(config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Sidecar:
    found = read_sidecar(json.dumps(config).encode(), None if preprocessor is None else json.dumps(preprocessor).encode())
    assert found is not None
    assert json.loads(json.dumps(found.options)) == found.options
    return found


# ---- timm


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("resnet18", {}, {"global_pool": "avg"}),
        ("resnet18", {"global_pool": "catavgmax"}, {"global_pool": "catavgmax"}),
        ("vit_tiny_patch16_224", {"img_size": 96}, {"img_size": 96, "global_pool": "token"}),
        ("mobilenetv3_small_100", {}, {"global_pool": "avg"}),
        ("inception_v3", {}, {"global_pool": "avg"}),
    ],
)
def test_what_timm_writes(name: str, arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7, **arguments)
    names = [f"bird {index}" for index in range(7)]
    save_config_for_hf(model, tmp_path / "config.json", model_config={"label_names": names}, model_args=arguments)
    found = read_sidecar((tmp_path / "config.json").read_bytes())
    assert found is not None
    assert (found.kind, found.architecture, found.num_classes, found.options) == ("timm", f"timm/{name}", 7, options)
    assert found.classes == tuple(names)
    assert found.notes == ()
    again = timm.create_model(name, num_classes=7, **found.options)
    assert [(key, value.shape) for key, value in again.state_dict().items()] == [(key, value.shape) for key, value in model.state_dict().items()]
    saved = json.loads((tmp_path / "config.json").read_bytes())["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=saved))
    for image in images():
        torch.testing.assert_close(ours(found.preprocessing, image), transform(image), rtol=0, atol=1e-5)


CFG = {"input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9, "interpolation": "bilinear", "num_classes": 3}
TIMM: dict[str, Any] = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": CFG}


def test_an_old_flat_config_of_timm() -> None:
    found = read({"architecture": "resnet18", "labels": ["a", "b", "c"], **CFG})
    assert found.preprocessing == Preprocessing(160, 177, "bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (found.num_classes, found.classes) == (3, ("a", "b", "c"))


def test_a_fixed_input_size_is_that_of_the_network() -> None:
    found = read({"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {**CFG, "fixed_input_size": True}})
    assert found.options == {"img_size": 160}


def test_squashed_images_lose_their_aspect() -> None:
    found = read({**TIMM, "pretrained_cfg": {**CFG, "crop_mode": "squash", "crop_pct": 1.0}})
    transform = timm.data.create_transform((3, 160, 160), interpolation="bilinear", mean=CFG["mean"], std=CFG["std"], crop_pct=1.0, crop_mode="squash")
    for image in images():
        torch.testing.assert_close(ours(found.preprocessing, image), transform(image), rtol=0, atol=1e-5)


def test_a_network_of_timm_that_transformers_wrapped(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path)
    found = read_sidecar((tmp_path / "config.json").read_bytes())
    assert found is not None
    assert (found.architecture, found.num_classes, found.classes, found.preprocessing) == ("timm/resnet18", 3, ("a", "b", "c"), None)


def test_arguments_that_are_not_followed_are_named_cleanly() -> None:
    arguments = {"img_size": [64, 64], "global_pool": "", "act_layer": "evil\x1b", "\x1b[31m": 1, "drop_rate": None, "in_chans": 3, "num_classes": 3}
    found = read({**TIMM, "model_args": arguments})
    assert found.options == {"img_size": 64}
    assert found.notes == ("Arguments in config.json were not followed: global_pool, act_layer, ??31m.",)
    assert read({**TIMM, "model_args": {"img_size": [64, 96]}}).options == {}
    assert read({**TIMM, "model_args": {"img_size": 10**9}}).options == {}
    assert read({**TIMM, "model_args": {"img_size": True}}).options == {}


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "../../x", "", "local-dir:/etc", "Resnet18", "x" * 1000])
def test_an_architecture_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointMismatch, match="which is no name of a network of timm"):
        read({**TIMM, "architecture": name})


@pytest.mark.parametrize(
    "changed",
    [
        {"input_size": [3, 160, 192]},
        {"input_size": [1, 160, 160]},
        {"input_size": [3, 4096, 4096]},
        {"input_size": "3x160x160"},
        {"mean": [0.1, 0.2]},
        {"mean": [0.1, 0.2, "0.3"]},
        {"std": [0, 0, 0]},
        {"std": [0.5, -0.5, 0.5]},
        {"crop_pct": 1e-9},
        {"crop_pct": [0.9]},
        {"crop_mode": "border"},
        {"interpolation": "lanczos"},
        {"interpolation": {"a": 1}},
    ],
)
def test_preprocessing_that_cannot_be_followed_is_noted(changed: dict[str, Any]) -> None:
    found = read({**TIMM, "pretrained_cfg": {**CFG, **changed}})
    assert found.preprocessing is None
    assert len(found.notes) == 1
    assert found.notes[0].startswith("The preprocessing that is stated beside the weights cannot be followed: ")


# ---- transformers

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {"depths": [1, 1], "hidden_sizes": [16, 32]},
    "vit": {"num_hidden_layers": 1},
    "mobilenet_v2": {"tf_padding": False},
    "convnext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "swin": {"depths": [1, 1], "num_heads": [2, 4]},
}
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessorPil", {}),
    ("ViTImageProcessorPil", {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.3, 0.4]}),
    ("ViTImageProcessorPil", {"size": 48, "do_rescale": False, "do_normalize": False}),
    ("ViTImageProcessorPil", {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": 64}),
    ("ConvNextImageProcessorPil", {}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessorPil", {"size": 100, "crop_pct": 0.95, "resample": 2}),
    ("MobileNetV2ImageProcessorPil", {}),
    ("MobileNetV2ImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_normalize": False}),
    ("DeiTImageProcessorPil", {}),
    ("BitImageProcessorPil", {}),
    ("CLIPImageProcessorPil", {}),
]


@pytest.mark.parametrize("kind", list(FAMILY_CONFIGS))
def test_what_transformers_writes(kind: str, tmp_path: Path) -> None:
    family = huggingface.FAMILIES[kind]
    names = ["plane", "car", "bird"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = getattr(transformers, family.name)(getattr(transformers, family.config)(**FAMILY_CONFIGS[kind], **labels))
    model.save_pretrained(tmp_path)
    found = read_sidecar((tmp_path / "config.json").read_bytes())
    assert found is not None
    assert (found.kind, found.architecture, found.num_classes) == ("transformers", f"transformers/{family.name}", 3)
    assert (found.classes, found.preprocessing, found.notes) == (tuple(names), None, ())
    rebuilt = huggingface.build(family.name, found.options, 3)
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_an_image_processor_and_what_is_read_of_it_give_the_same_pixels(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(tmp_path)
    found = read_sidecar(json.dumps(VIT).encode(), (tmp_path / "preprocessor_config.json").read_bytes())
    assert found is not None
    assert found.notes == ()
    for image in images():
        theirs = torch.as_tensor(processor(image)["pixel_values"][0])
        # A centre between two pixels is rounded the other way by transformers: a crop may lie one pixel beside theirs.
        torch.testing.assert_close(ours(found.preprocessing, image), theirs.float(), rtol=0, atol=0.03 * theirs.abs().max().item())


VIT: dict[str, Any] = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "transformers_version": "4.0.0"}
OLD_VIT = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 224}
OLD_CONVNEXT = {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224}


@pytest.mark.parametrize(
    ("model_type", "preprocessor", "expected"),
    [
        ("vit", OLD_VIT, Preprocessing(224, 224, "bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, aspect="stretch")),
        ("resnet", OLD_CONVNEXT, Preprocessing(224, 256, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)),
        ("resnet", {"size": 384}, Preprocessing(384, 384, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, aspect="stretch")),
        ("swin", {"size": 224}, Preprocessing(224, 224, "bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, aspect="stretch")),
        ("mobilenet_v2", {"image_mean": 0.0, "image_std": 1.0}, Preprocessing(224, 256, "bilinear")),
        (
            "vit",
            {"image_processor_type": "ViTImageProcessorFast", "rescale_factor": 1},
            Preprocessing(224, 224, "bilinear", "rgb", "byte", (0.5,) * 3, (0.5,) * 3, "stretch"),
        ),
    ],
)
def test_what_older_versions_wrote(model_type: str, preprocessor: dict[str, Any], expected: Preprocessing) -> None:
    assert read({**VIT, "model_type": model_type, "architectures": None}, preprocessor).preprocessing == expected


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"image_processor_type": "EvilImageProcessor\x1b[31m", "auto_map": {"AutoImageProcessor": "evil.Evil"}},
        {"image_processor_type": ["ViTImageProcessor"]},
        {"size": {"longest_edge": 224}},
        {"size": {"height": 224, "width": 256}},
        {"size": {"shortest_edge": 224}},
        {"size": 10**400},
        {"size": -224},
        {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 224},
        {"do_center_crop": True, "crop_size": {"height": 100, "width": 200}},
        {"do_center_crop": True, "crop_size": 300},
        {"do_resize": False},
        {"resample": 1},
        {"resample": "bilinear"},
        {"rescale_factor": 0.5},
        {"image_mean": [0.5, 0.5, True]},
        {"image_std": 0},
    ],
)
def test_image_processors_that_cannot_be_followed_are_noted(preprocessor: dict[str, Any]) -> None:
    found = read(VIT, preprocessor)
    assert found.preprocessing is None
    assert len(found.notes) == 1
    assert found.notes[0].startswith("The preprocessing that is stated beside the weights cannot be followed: ")
    assert found.notes[0].isprintable()


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="the model type bert;"):
        read({**VIT, "model_type": "bert"})


def test_other_weights_than_those_of_a_classifier_are_noted() -> None:
    assert read({**VIT, "architectures": ["ViTModel"]}).notes == (
        "config.json says that the weights are those of a ViTModel, not of a ViTForImageClassification.",
    )


# ---- names and JSON


@pytest.mark.parametrize(
    ("labels", "classes", "noted"),
    [
        ({"0": "cat", "1": "dog"}, ("cat", "dog"), False),
        ({"1": "dog", "0": "cat"}, ("cat", "dog"), False),
        ({"0": "crane", "1": "crane"}, ("crane", "crane"), False),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None, False),
        ({"0": "cat", "2": "dog"}, None, True),
        ({"0": "cat", "1": 7}, None, True),
        ({"0": "cat", "1": "d\x1b[31mog"}, None, True),
        ({"0": "cat", "1": "d" * 201}, None, True),
        ({}, None, True),
        ("cat dog", None, True),
        (None, None, False),
    ],
)
def test_class_names(labels: object, classes: tuple[str, ...] | None, noted: bool) -> None:
    found = read({**VIT, "id2label": labels})
    assert found.classes == classes
    assert bool(found.notes) == noted


def test_too_many_names_are_left_aside() -> None:
    found = read({**VIT, "id2label": {str(index): "a" for index in range(100_001)}})
    assert (found.num_classes, found.classes) == (None, None)


@pytest.mark.parametrize(
    "config", [{}, [], 3, None, "vit", {"model_type": "vit"}, {"architecture": "resnet18"}, {"architecture": ["resnet18"], "pretrained_cfg": {}}, {"lr": 0.1}]
)
def test_a_config_of_somebody_else_is_none_of_ours(config: object) -> None:
    assert read_sidecar(json.dumps(config).encode()) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"model_type": "vit", "model_type": "vit"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b" " * (MOST_BYTES + 1),
    ],
    ids=range(10),
)
def test_damaged_json_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointInvalid, match=r"^config\.json is "):
        read_sidecar(data)
    with pytest.raises(CheckpointInvalid, match=r"^preprocessor_config\.json is "):
        read_sidecar(json.dumps(VIT).encode(), data)


def test_a_number_beyond_all_bounds_is_no_number() -> None:
    assert read_sidecar(json.dumps({**TIMM, "pretrained_cfg": {**CFG, "crop_pct": "?"}}).replace('"?"', "1e999").encode()).preprocessing is None  # type: ignore[union-attr]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *("architecture", "pretrained_cfg", "model_args", "num_classes", "label_names", "model_type", "architectures", "id2label", "num_labels", "problem_type"),
    *("input_size", "fixed_input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "size", "crop_size", "do_resize", "do_center_crop"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "image_processor_type", "img_size", "hidden_size", "depths"),
)
CLAIMS = st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=6)


@given(st.sampled_from([VIT, TIMM, {**VIT, "model_type": "swin"}, {**VIT, "model_type": "convnext"}]), CLAIMS, CLAIMS)
def test_whatever_stands_there_gives_a_sidecar_a_refusal_or_nothing(base: dict[str, Any], config: dict[str, Any], inner: dict[str, Any]) -> None:
    try:
        found = read_sidecar(
            json.dumps({**base, **config, "pretrained_cfg": inner} if base is TIMM else {**base, **config}).encode(), json.dumps(inner).encode()
        )
    except CheckpointProblem:
        return
    if found is not None:
        json.dumps(found.options)
        assert all(note.isprintable() for note in found.notes)
        if found.preprocessing is not None:
            assert ours(found.preprocessing, Image.new("RGB", (9, 9))).isfinite().all()


def test_strict_json_is_json() -> None:
    assert strict_json('{"é": [1, 2.5, null, true]}'.encode(), "x.json") == {"é": [1, 2.5, None, True]}
