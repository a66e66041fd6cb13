"""What little data would keep a decoder busy for long is refused before it begins; what cameras and programs write is taken, pixel for pixel."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from calibration.clean_set import open_clean_set
from models.encoded import MOST_CHUNKS, MOST_HEAD_BYTES, MOST_PROFILES, MOST_SCANNED_PIXELS, MOST_SCANS, MOST_SEGMENTS, bare_jpeg, check_scans
from models.errors import CleanSetInvalid, ImageTooComplex, ImageUndecodable
from models.preprocessing import MAX_PIXELS, decode
from tests.support import encode, jpeg, pixels, png

SCAN = b"\xff\xda"
PROGRESSIVE = jpeg(progressive=True)


def repeated(times: int, data: bytes = PROGRESSIVE) -> bytes:
    """A JPEG with its last scan this many times."""
    at = data.rindex(SCAN)
    return data[:at] + data[at:-2] * times + data[-2:]


def segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def headed(*pieces: bytes, data: bytes = PROGRESSIVE) -> bytes:
    """A JPEG with these between its first marker and all else."""
    return data[:2] + b"".join(pieces) + data[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def spliced(more: bytes) -> bytes:
    """A PNG with chunks of one's own behind its header."""
    return png()[:33] + more + png()[33:]


PROFILE = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1000)))
SCANS = PROGRESSIVE.count(SCAN)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(repeated(MOST_SCANS - SCANS + 2), id="a scan too many"),
        pytest.param(repeated(250_000), id="ten megabytes of scans"),
        pytest.param(repeated(200).replace(SCAN, b"\xff\xff\xff\xda"), id="scans behind padding"),
        pytest.param(repeated(200).replace(SCAN, b"\xff\x02" + SCAN).replace(b"\xff\x02", b"", 1), id="scans behind markers that nobody knows"),
        pytest.param(repeated(200).replace(SCAN, b"\xff\xd3" + segment(0xFE, b"a") + SCAN), id="scans behind comments"),
        pytest.param(headed(segment(0xE5, b"") * MOST_SEGMENTS), id="empty segments"),
        pytest.param(headed(segment(0xE1, b"Exif\0\0") * MOST_SEGMENTS), id="metadata in pieces"),
        pytest.param(headed(segment(0xDB, b"\0" + b"\1" * 64) * (MOST_HEAD_BYTES // 69 + 1)), id="tables one after the other"),
        pytest.param(headed(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 5), id="many tables in few segments"),
        pytest.param(spliced(chunk(b"tEXt", b"") * MOST_CHUNKS), id="empty texts"),
        pytest.param(spliced(chunk(b"abCd", b"") * MOST_CHUNKS), id="chunks that nobody knows"),
        pytest.param(png()[:-12] + chunk(b"IDAT", b"") * MOST_CHUNKS + png()[-12:], id="empty chunks behind the pixels"),
        pytest.param(spliced(PROFILE * (MOST_PROFILES + 1)), id="colour profiles"),
    ],
)
def test_is_too_complex(data: bytes) -> None:
    with pytest.raises(ImageTooComplex, match="save it anew"):
        decode(data)


@pytest.mark.parametrize(("width", "height", "most"), [(5000, 5000, 24), (4096, 1024, MOST_SCANS), (8, 8, MOST_SCANS), (8192, 3000, 24)])
def test_the_larger_the_image_the_fewer_its_scans(width: int, height: int, most: int) -> None:
    assert width * height * most <= MOST_SCANNED_PIXELS
    check_scans(repeated(most - SCANS + 1), width, height)
    with pytest.raises(ImageTooComplex, match=f"more than {most} scans of {width}x{height} pixels"):
        check_scans(repeated(most - SCANS + 2), width, height)


def test_a_large_image_of_many_scans_is_refused_by_the_size_that_it_says_it_has() -> None:
    size = PROGRESSIVE.index(b"\xff\xc2") + 5
    claimed = PROGRESSIVE[:size] + struct.pack(">HH", 5000, 5000) + PROGRESSIVE[size + 4 :]
    assert MAX_PIXELS == 5000 * 5000
    with pytest.raises(ImageTooComplex):
        decode(repeated(24, claimed))


THUMBNAIL = b"II*\0\x08\0\0\0\0\0\0\0\0\0" + repeated(20)  # as in EXIF: a JPEG of its own, with scans of its own
COLOUR, CMYK = Image.fromarray(pixels()), Image.fromarray(pixels(channels=4), "CMYK")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(jpeg(), id="baseline"),
        pytest.param(PROGRESSIVE, id="progressive"),
        pytest.param(encode(Image.fromarray(pixels(channels=1)), "JPEG", progressive=True), id="progressive grey"),
        pytest.param(encode(CMYK, "JPEG", progressive=True), id="progressive in four colours"),
        pytest.param(jpeg(progressive=True, restart_marker_blocks=1), id="progressive with restarts"),
        pytest.param(jpeg(progressive=True, exif=b"Exif\0\0" + THUMBNAIL * 5, comment=SCAN * 500), id="thumbnails of many scans"),
        pytest.param(jpeg(progressive=True, icc_profile=SCAN * 50_000), id="a colour profile that looks like scans"),
        pytest.param(encode(COLOUR, "MPO", save_all=True, append_images=[COLOUR.rotate(90)] * 120), id="several pictures in one file"),
        pytest.param(repeated(MOST_SCANS - SCANS + 1), id="many scans"),
        pytest.param(PROGRESSIVE + SCAN * 1000, id="a film behind the image"),
        pytest.param(headed(b"\xff" * 100_000, b"\0" * 100_000, b"\xff\0" * 50_000), id="padding"),
        pytest.param(headed(*[segment(0xE1, b"x" * 65_533)] * 150), id="ten megabytes of metadata"),
        pytest.param(spliced(chunk(b"tEXt", b"a\0b") * 1000 + PROFILE), id="a PNG with texts and a profile"),
        pytest.param(spliced(chunk(b"abCd", b"iCCP" * MOST_PROFILES)), id="a PNG that speaks of profiles"),
        pytest.param(png() + chunk(b"tEXt", b"") * MOST_CHUNKS, id="a PNG with more behind it"),
    ],
)
def test_is_decoded_as_pillow_does(data: bytes) -> None:
    assert decode(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize(
    "data",
    [b"\xff\xd8\xff", PROGRESSIVE[:100], headed(b"\xff\x01"), headed(segment(0xF7, b"x")), headed(segment(0xC8, b"x"))],
    ids=["nothing", "the beginning", "a marker that nobody knows", "JPEG-LS", "an extension"],
)
def test_a_head_that_no_decoder_knows_is_refused(data: bytes) -> None:
    with pytest.raises(ImageUndecodable):
        bare_jpeg(data)


def test_metadata_never_reach_the_decoder() -> None:
    spoken = headed(segment(0xE1, b"Exif\0\0" + THUMBNAIL), segment(0xE2, b"MPF\0"), segment(0xFE, b"hello"), b"\xff\xff\xff")
    assert bare_jpeg(spoken) == PROGRESSIVE


def test_images_of_a_clean_set_are_held_to_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(60):
            (tmp_path / name / f"{number}.jpg").write_bytes(repeated(200) if number == 7 else PROGRESSIVE)
    with pytest.raises(CleanSetInvalid, match=r"a/7\.jpg' cannot be used\. The JPEG has more than 100 scans"):
        open_clean_set(tmp_path)
