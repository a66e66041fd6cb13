"""What is decoded at once, on the event loop, and what goes to a thread."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
import zlib
from dataclasses import replace

import pytest
import torch
from PIL import Image

from models.preprocessing import Preprocessing, decode
from service.images import SMALL_BYTES, SMALL_PIXELS, Images, is_small
from tests.support import encode, jpeg, png

SIDE = 64
FLAT = encode(Image.new("RGB", (SIDE, SIDE), "red"), "PNG")
HEADER = FLAT[:33]  # the signature and IHDR


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def spliced(more: bytes) -> bytes:
    """The flat PNG with chunks of one's own behind its header."""
    return HEADER + more + FLAT[33:]


def test_the_constants_are_those_of_the_largest_flat_image_here() -> None:
    assert SIDE**2 == SMALL_PIXELS and len(FLAT) < SMALL_BYTES


@pytest.mark.parametrize("data", [png(), FLAT, spliced(chunk(b"tEXt", b"a\0b"))], ids=["32x32", "as large as may be", "with a text"])
def test_small(data: bytes) -> None:
    assert is_small(data, Preprocessing())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEADER[:12],
        b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"a\0b") + FLAT[8:],
        encode(Image.new("RGB", (SIDE + 1, SIDE)), "PNG"),
        encode(Image.new("RGB", (5000, 5000)), "PNG")[:SMALL_BYTES],
        spliced(chunk(b"IHDR", struct.pack(">II5B", 5000, 5000, 8, 2, 0, 0, 0))),
        spliced(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))),
        spliced(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**20)))),
        spliced(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))),
        png(SIDE, SIDE),
        jpeg(),
        HEADER[:16] + bytes(8) + FLAT[24:],
    ],
    ids=["nothing", "a piece", "IHDR later", "a column more", "many pixels", "IHDR twice", "zTXt", "iTXt", "iCCP", "many bytes", "JPEG", "no pixels"],
)
def test_not_small(data: bytes) -> None:
    assert not is_small(data, Preprocessing())


@pytest.mark.parametrize(
    ("data", "preprocessing"),
    [
        (encode(Image.new("RGB", (8, 512)), "PNG"), Preprocessing(64, 64)),
        (FLAT, Preprocessing(64, 2048)),
        (FLAT, Preprocessing(224, 64)),
    ],
    ids=["a strip", "resized to much", "a large input"],
)
def test_not_small_for_what_is_made_of_it(data: bytes, preprocessing: Preprocessing) -> None:
    assert is_small(data, replace(preprocessing, size=32, resize=32, aspect="stretch"))
    assert not is_small(data, preprocessing)


@pytest.mark.parametrize(
    ("data", "size", "alone", "at_once"),
    [(png(), 32, True, True), (png(), SIDE, True, True), (png(), 224, True, False), (jpeg(), 32, True, False), (png(), 32, False, False)],
    ids=["small", "enlarged a little", "for a large network", "JPEG", "one of several"],
)
def test_the_pixels_are_the_same_in_either_place(data: bytes, size: int, alone: bool, at_once: bool) -> None:
    decoders = list[threading.Thread]()

    class Observed(Preprocessing):
        def pixels(self, image: Image.Image) -> torch.Tensor:
            decoders.append(threading.current_thread())
            return super().pixels(image)

    images = Images(image_bytes=2**20, batch_images=1, body_bytes=2**20, workers=1, pending=1)
    try:
        found = asyncio.run(images.pixels(data, Observed(size, size), math.inf, alone=alone))
        assert torch.equal(found, Preprocessing(size, size).pixels(decode(data)))
        assert (decoders == [threading.current_thread()]) is at_once
    finally:
        images.close()
