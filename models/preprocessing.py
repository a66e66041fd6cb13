"""Bytes -> RGB -> tensor, exactly as the suspect was trained to see it.

Refuses everything but PNG, JPEG and WebP, by content, and what is too large as it is or resized, or too complex, before a pixel is decoded. Conversion to RGB
is Pillow's, as in torchvision's ImageFolder: alpha is dropped, grey is repeated, CMYK and palettes are converted; the EXIF orientation is not applied,
since training loaders do not apply it.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.encoded import bare_jpeg, check_chunks, check_scans
from models.errors import ImageFormat, ImageMode, ImageProblem, ImageTooLarge, ImageTooSmall, ImageUndecodable

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE, MAX_SIDE, MAX_PIXELS = 8, 8192, 25_000_000
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_PNG_END, _JPEG = b"IEND\xaeB`\x82", b"\xff\xd8"
# Pillow warns of damaged metadata and of bombs; the one does not matter here, the other is refused below. Filters belong to the whole process,
# so they are set once, and not around each decode: that happens in many threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
_RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, preprocessing: Preprocessing | None = None) -> Image.Image:
    """An RGB image of at most 25 megapixels, first frame only. Raises a subclass of ImageProblem; never anything else.

    preprocessing: what will be done with the image; one that it would resize to more than 25 megapixels is refused before a pixel is decoded.
    """
    _check_signature(data)
    kind = data[:2]
    if kind == b"\x89P":
        check_chunks(data)
    elif kind == _JPEG:
        data = bare_jpeg(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size)
        if preprocessing is not None:
            preprocessing.check(*image.size)
        if image.mode not in _EIGHT_BIT_MODES:
            raise ImageMode(f"The image has pixels of mode {image.mode}; save it as 8-bit grey, palette, RGB or CMYK.")
        if kind == _JPEG:
            check_scans(data, *image.size)
        if image.mode == "RGB":
            image.load()
            return image
        return image.convert("RGB")
    except (ImageProblem, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge from error
    except UnidentifiedImageError as error:
        raise ImageUndecodable from error
    except Exception as error:  # a decoder may raise anything on hostile bytes: struct, zlib, Index-, Key-, Type-, ValueError were all seen
        raise ImageUndecodable from error


def _check_signature(data: bytes) -> None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if _PNG_END not in data:
            raise ImageUndecodable("The PNG is truncated: its end marker is missing.")
        return
    if data.startswith(_JPEG + b"\xff") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return
    if len(data) < 12:
        raise ImageUndecodable("The image is truncated: it is shorter than any image header.")
    raise ImageFormat


def _check_size(width: int, height: int) -> None:
    if min(width, height) == 0:
        raise ImageUndecodable("The image has no pixels.")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageTooLarge(f"The image is {width}x{height}; at most {MAX_SIDE} pixels a side and {MAX_PIXELS:,} pixels in all are taken.")
    if min(width, height) < MIN_SIDE:
        raise ImageTooSmall(f"The image is {width}x{height}; at least {MIN_SIDE} pixels a side are needed.")


@cache  # of few preprocessings, and never given back: a CUDA graph reads them where they are
@torch.inference_mode(False)  # whoever asks first, others train with it
def _on(device: torch.device, channels: tuple[float, float, float]) -> Tensor:
    """float32 [3, 1, 1]. Made once: a GPU waits for each number that is brought to it, and a graph can bring none."""
    return torch.tensor(channels, dtype=torch.float32, device=device)[:, None, None]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the suspect's input.

    The shorter side is resized to `resize` pixels (both sides where `aspect` is "stretch", as Hugging Face's ViT does), the centre is cropped to
    `size` x `size`, pixels are scaled to [0, 1] (or left in [0, 255] where `scale` is "byte"), put into `channels` order, and normalised with
    `mean` and `std` in that order.
    """

    size: int = 32
    resize: int = 32
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: Literal["unit", "byte"] = "unit"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    aspect: Literal["keep", "stretch"] = "keep"

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, in pixels, of an image of these sides (at least 1) once it is resized and not yet cropped."""
        # torchvision's Resize: the long side is truncated, not rounded.
        long = self.resize if self.aspect == "stretch" else int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)

    def check(self, width: int, height: int) -> None:
        """Raises ImageTooLarge for an image of these sides, in pixels, that would be too large once it is resized.

        All of it is resized before the centre is cropped: where the shorter side becomes 256, a strip of 8x8192 pixels becomes 67 million.
        """
        wide, high = self.resized(width, height)
        if wide * high > MAX_PIXELS:
            raise ImageTooLarge(
                f"The image is {width}x{height} and would be resized to {wide}x{high} before its centre is cropped; at most {MAX_PIXELS:,} pixels are taken."
            )

    def pixels(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 [3, size, size], still in RGB order: all that must happen before the device. Raises ImageTooLarge, see `check`."""
        width, height = image.size
        self.check(width, height)  # here too: images of a clean set are decoded before it is known how the suspect sees them
        shape = self.resized(width, height)
        if image.size != shape:
            image = image.resize(shape, _RESAMPLING[self.interpolation])
            width, height = shape
        if (width, height) != (self.size, self.size):
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))  # pads with black where the crop is larger
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # [H, W, 3] -> [3, H, W]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] on any device -> float32 of the same shape, channels last."""
        mean, std = (_on(pixels.device, channels) for channels in (self.mean, self.std))
        values = pixels.float()
        if self.scale == "unit":
            values = values / 255
        if self.channels == "bgr":
            values = values.flip(1)
        return ((values - mean) / std).contiguous(memory_format=torch.channels_last)

    def __str__(self) -> str:
        numbers = ["{:g}, {:g}, {:g}".format(*triple) for triple in (self.mean, self.std)]
        scale = "0 to 1" if self.scale == "unit" else "0 to 255"
        shape = f"{self.resize} px" + (" (stretched)" if self.aspect == "stretch" else "") + (f", crop {self.size}" if self.size != self.resize else "")
        return f"{self.channels.upper()} {scale}, {shape}, {self.interpolation}, mean {numbers[0]}, std {numbers[1]}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """Reads what `to_json` wrote, now or before a field with a default was added."""
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
