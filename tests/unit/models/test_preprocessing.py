"""Images become exactly the tensors that torchvision would make of them; anything else is refused by its content."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from models.errors import ImageFormat, ImageProblem, ImageTooLarge, ImageTooSmall, ImageUndecodable
from models.preprocessing import Preprocessing, decode
from tests.conftest import EXAMPLES


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def saved(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(("width", "height"), [(32, 32), (300, 200), (200, 301), (500, 224), (256, 256)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 224), (32, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_geometry_is_torchvisions(width: int, height: int, size: int, resize: int, interpolation: str) -> None:
    image = picture(width, height)
    expected = v2.Compose(
        [v2.Resize(resize, v2.InterpolationMode(interpolation)), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.uint8)],
    )(image)
    assert torch.equal(Preprocessing(size=size, resize=resize, interpolation=interpolation).pixels(image), expected)  # type: ignore[arg-type]


def test_normalisation_is_torchvisions() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = v2.functional.normalize(pixels.float() / 255, list(mean), list(std))
    torch.testing.assert_close(Preprocessing(mean=mean, std=std).normalise(pixels), expected)


def test_byte_scale_and_reversed_channels() -> None:
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    preprocessing = Preprocessing(size=8, resize=8, channels="bgr", scale="byte", mean=(103.939, 116.779, 123.68))
    blue_first = preprocessing.normalise(pixels)
    torch.testing.assert_close(blue_first[:, 0], pixels[:, 2].float() - 103.939)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Real images, cut to sides that are not equal."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        names = sorted(archive.namelist())[::500]
        return [decode(archive.read(name)).crop((0, 0, 32 - i, 20 + i)) for i, name in enumerate(names)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_stretching_is_torchvisions(photographs: list[Image.Image], interpolation: str) -> None:
    stretch = Preprocessing(size=56, resize=64, interpolation=interpolation, aspect="stretch")  # type: ignore[arg-type]
    steps = [v2.Resize((64, 64), v2.InterpolationMode(interpolation)), v2.CenterCrop(56), v2.ToImage()]
    for image in photographs:
        assert torch.equal(stretch.pixels(image), v2.Compose(steps)(image))


def test_stretching_is_that_of_transformers(photographs: list[Image.Image]) -> None:
    processor = pytest.importorskip("transformers.models.vit.image_processing_pil_vit").ViTImageProcessorPil(size={"height": 48, "width": 48})
    preprocessing = Preprocessing(48, 48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), aspect="stretch")
    for image in photographs:
        expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        torch.testing.assert_close(preprocessing.normalise(preprocessing.pixels(image)[None])[0], expected)


def test_reads_json_from_before_images_could_be_stretched() -> None:
    old = Preprocessing(size=224, resize=256).to_json()
    del old["aspect"]
    assert Preprocessing.from_json(old) == Preprocessing(size=224, resize=256)


def test_survives_json() -> None:
    preprocessing = Preprocessing(size=224, resize=256, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), channels="bgr", aspect="stretch")
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_takes_the_three_formats(kind: str) -> None:
    assert decode(saved(picture(40, 30), kind)).size == (40, 30)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_converts_every_eight_bit_mode_as_pillow_does(mode: str) -> None:
    image = picture(16, 16, "RGB").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = saved(image, kind)
    assert decode(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_does_not_turn_images_by_their_exif_orientation() -> None:
    image = picture(40, 20)
    exif = image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    assert decode(stream.getvalue()).size == (40, 20)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_refuses_other_formats_by_content(kind: str) -> None:
    with pytest.raises(ImageFormat):
        decode(saved(picture(16, 16), kind))


def test_refuses_tiny_images() -> None:
    with pytest.raises(ImageTooSmall):
        decode(saved(picture(7, 16), "PNG"))


RESIZED_TO_256 = Preprocessing(size=224, resize=256)


@pytest.mark.parametrize(("width", "height", "resized"), [(8, 8192, "256x262144"), (8192, 8, "262144x256"), (8, 3052, "256x97664")])
def test_refuses_images_that_would_be_too_large_once_resized(width: int, height: int, resized: str) -> None:
    image = Image.new("RGB", (width, height))
    data = saved(image, "PNG")
    found = []
    for call in (
        lambda: decode(data, RESIZED_TO_256),
        lambda: decode(data[:100] + data[-12:], RESIZED_TO_256),  # without its pixels: they are not looked at
        lambda: RESIZED_TO_256.pixels(image),  # as an image of a clean set
    ):
        with pytest.raises(ImageTooLarge) as caught:
            call()
        found.append(caught.value.detail)
    assert set(found) == {f"The image is {width}x{height} and would be resized to {resized} before its centre is cropped; at most 25,000,000 pixels are taken."}


@pytest.mark.parametrize(
    ("width", "height", "preprocessing"),
    [
        (8, 3051, RESIZED_TO_256),
        (8, 3200, Preprocessing(size=224, resize=250)),
        (8192, 8, Preprocessing()),
        (8, 8192, Preprocessing(size=224, resize=2048, aspect="stretch")),
    ],
    ids=["almost as large as may be", "as large as may be", "a small resize", "stretched"],
)
def test_takes_long_thin_images_otherwise(width: int, height: int, preprocessing: Preprocessing) -> None:
    image = decode(saved(Image.new("RGB", (width, height)), "PNG"), preprocessing)
    assert image.size == (width, height)
    assert preprocessing.pixels(image).shape == (3, preprocessing.size, preprocessing.size)


def test_is_too_small_before_it_is_too_large_once_resized() -> None:
    with pytest.raises(ImageTooSmall):
        decode(saved(Image.new("RGB", (1, 8192)), "PNG"), RESIZED_TO_256)


@pytest.mark.parametrize("kept", range(1, 2000, 64))
def test_a_truncated_png_is_refused_wherever_it_ends(kept: int) -> None:
    data = saved(picture(24, 24), "PNG")
    with pytest.raises(ImageUndecodable):
        decode(data[: min(kept, len(data) - 1)])


@given(position=st.integers(0, 1500), bit=st.integers(0, 7), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_a_flipped_bit_never_raises_anything_but_a_refusal(position: int, bit: int, kind: str) -> None:
    data = bytearray(saved(picture(24, 24), kind))
    data[position % len(data)] ^= 1 << bit
    with contextlib.suppress(ImageProblem):
        assert decode(bytes(data)).mode == "RGB"
