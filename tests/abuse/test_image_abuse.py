"""Rows A1 to A28, A31 and A32 of the abuse catalogue: what callers may send as an image, through the whole application. After every row a good
image is judged as before, and no row is answered 5xx but those that say so."""

from __future__ import annotations

import io
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.preprocessing import decode
from models.registry import Registry
from service.engine import Engine, LiveGuard, Outcome
from tests.abuse.calls import PREDICT
from tests.support import MULTIPART, Client, assert_problem, encode, form, jpeg, make_service, part, pixels, png, publish, serving

IMAGE_BYTES = 1024 * 1024
SLACK = 5.0  # times that the catalogue gives are of a faster core; they are counted in seconds of this process, so that what else runs does not matter


@pytest.fixture(scope="module")
def module_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("data"), image_bytes=IMAGE_BYTES)) as client:
        yield client


@pytest.fixture
def client(module_client: Client) -> Iterator[Client]:
    yield module_client
    module_client.assert_serves()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, rows: bytes = b"", extra: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A grey PNG from its chunks: sizes may lie."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def zeros_png(width: int, height: int) -> bytes:
    """All black, written without ever holding the pixels."""
    packer, packed = zlib.compressobj(9), []
    line = bytes(1 + 3 * width)
    for _ in range(height):
        packed.append(packer.compress(line))
    data = b"".join([*packed, packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def apng(frames: int) -> bytes:
    first, *rest = [Image.fromarray(pixels(16, 16, seed=seed)) for seed in range(frames)]
    return encode(first, "PNG", save_all=True, append_images=rest, duration=1)


def multi(*parts: bytes) -> tuple[str, bytes]:
    return MULTIPART, form(*parts)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "x" * 100)
    return stream.getvalue()


GREY = Image.fromarray(pixels(channels=1))
COLOUR = Image.fromarray(pixels())


def refused(row: str, status: int, code: str, make: Callable[[], tuple[str, bytes]]) -> object:
    return pytest.param(status, code, make, id=row)


def image(data: bytes) -> tuple[str, bytes]:
    return "image/png", data


@pytest.mark.parametrize(
    ("status", "code", "make"),
    [
        refused("A1: an empty body is refused", 400, "body_empty", lambda: image(b"")),
        refused("A1: an empty part is refused", 400, "body_empty", lambda: multi(part("image", b""))),
        refused("A2: a form without parts is refused", 422, "image_missing", multi),
        refused("A3: two images are refused", 422, "one_image_only", lambda: multi(part("image", png()), part("image", png()))),
        refused("A4: a part of another name is refused", 422, "unexpected_field", lambda: multi(part("picture", png()))),
        refused("A4: a text field beside the image is refused", 422, "unexpected_field", lambda: multi(part("image", png()), part("note", b"x", None))),
        refused("A5: an image part that is text is refused", 422, "image_missing", lambda: multi(part("image", png(), None))),
        refused("A6: a body one byte over the cap is refused", 413, "body_too_large", lambda: image(bytes(IMAGE_BYTES + 1))),
        refused("A6: a part one byte over the cap is refused", 413, "body_too_large", lambda: multi(part("image", bytes(IMAGE_BYTES + 1)))),
        refused("A9: GIF is refused", 415, "image_format", lambda: image(encode(COLOUR, "GIF"))),
        refused("A9: BMP is refused", 415, "image_format", lambda: image(encode(COLOUR, "BMP"))),
        refused("A9: TIFF is refused", 415, "image_format", lambda: image(encode(COLOUR, "TIFF"))),
        refused("A9: AVIF is refused", 415, "image_format", lambda: image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf")),
        refused("A9: PPM is refused", 415, "image_format", lambda: image(encode(COLOUR, "PPM"))),
        refused("A9: ICO is refused", 415, "image_format", lambda: image(encode(COLOUR, "ICO"))),
        refused("A9: PSD is refused", 415, "image_format", lambda: image(b"8BPS\0\1" + bytes(40))),
        refused("A9: FITS is refused", 415, "image_format", lambda: image(b"SIMPLE  =                    T".ljust(2880))),
        refused("A9: DDS is refused", 415, "image_format", lambda: image(encode(COLOUR, "DDS"))),
        refused("A10: SVG is refused", 415, "image_format", lambda: image(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')),
        refused("A10: EPS is refused", 415, "image_format", lambda: image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")),
        refused("A10: PDF is refused", 415, "image_format", lambda: image(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")),
        refused("A10: HTML is refused", 415, "image_format", lambda: image(b"<!doctype html><script>alert(1)</script>")),
        refused("A10: plain text is refused", 415, "image_format", lambda: image(b"hello, this is no image")),
        refused("A10: ZIP is refused", 415, "image_format", lambda: image(zipped())),
        refused("A10: ELF is refused", 415, "image_format", lambda: image(b"\x7fELF\x02\x01\x01" + bytes(64))),
        refused("A12: one byte is refused", 422, "image_undecodable", lambda: image(b"\x89")),
        refused("A12: the PNG magic alone is refused", 422, "image_undecodable", lambda: image(b"\x89PNG\r\n\x1a\n")),
        refused("A13: half a JPEG is refused", 422, "image_undecodable", lambda: image(jpeg()[: len(jpeg()) // 2])),
        refused("A13: half a WebP is refused", 422, "image_undecodable", lambda: image(encode(COLOUR, "WEBP")[:400])),
        refused("A14: an IHDR with a wrong checksum is refused", 422, "image_undecodable", lambda: image(png()[:29] + b"\0\0\0\0" + png()[33:])),
        refused("A15: a PNG without pixels is refused", 422, "image_undecodable", lambda: image(raw_png(0, 0))),
        refused("A16: 1x1 is too small", 422, "image_too_small", lambda: image(png(1, 1))),
        refused("A16: 1x2000 is too small", 422, "image_too_small", lambda: image(png(1, 2000))),
        refused("A16: 2x3 is too small", 422, "image_too_small", lambda: image(png(2, 3))),
        refused("A16: 7x7 is too small", 422, "image_too_small", lambda: image(png(7, 7))),
        refused("A17: 8193x10 is too large", 422, "image_too_large", lambda: image(png(8193, 10))),
        refused("A18: a claim of 20000x20000 is refused", 422, "image_too_large", lambda: image(raw_png(20_000, 20_000, b"\0"))),
        refused("A18: a claim of 11000x11000, which Pillow only warns of, is refused", 422, "image_too_large", lambda: image(raw_png(11_000, 11_000, b"\0"))),
        refused("A18: a claim of 2147483647x1 is refused", 422, "image_too_large", lambda: image(raw_png(2**31 - 1, 1, b"\0"))),
        refused("A20: a text chunk that inflates to 50 MB is refused", 422, "image_undecodable", lambda: image(inflating(b"zTXt", b"Comment\0\0"))),
        refused("A20: a colour profile that inflates to 50 MB is refused", 422, "image_undecodable", lambda: image(inflating(b"iCCP", b"icc\0\0"))),
        refused("A23: a 16-bit grey PNG is refused", 422, "image_mode", lambda: image(encode(Image.fromarray(np.zeros((32, 32), np.uint16)), "PNG"))),
        refused("A24: a JPEG whose tail passes the cap is refused", 413, "body_too_large", lambda: image(jpeg() + bytes(IMAGE_BYTES))),
        refused("A26: a data URL is refused", 415, "media_type", lambda: ("text/plain", b"data:image/png;base64,iVBORw0KGgo=")),
        refused("A26: base64 text is refused", 415, "media_type", lambda: ("text/plain", b"iVBORw0KGgo=")),
        refused("A26: JSON with a URL is refused", 415, "media_type", lambda: ("application/json", b'{"image_url": "http://127.0.0.1/a.png"}')),
        refused("A27: a form of text fields is refused", 415, "media_type", lambda: ("application/x-www-form-urlencoded", b"image=x")),
    ],
)
def test_is_refused(client: Client, status: int, code: str, make: Callable[[], tuple[str, bytes]]) -> None:
    content_type, data = make()
    assert_problem(client.predict(data, content_type), status, code)


def inflating(kind: bytes, head: bytes) -> bytes:
    return raw_png(32, 32, bytes(33 * 32), chunk(kind, head + zlib.compress(bytes(50_000_000), 9)))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def taken(row: str, make: Callable[[], tuple[str, bytes]]) -> object:
    return pytest.param(make, id=row)


def progressive(times: int) -> bytes:
    """A progressive JPEG whose last scan comes this often: each is a pass over 4 megapixels for a few bytes."""
    data = encode(Image.new("L", (4096, 1024), 128), "JPEG", quality=30, progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * times + data[-2:]


@pytest.mark.parametrize(
    "make",
    [
        taken("A11: a PNG labelled JPEG is judged", lambda: ("image/jpeg", png())),
        taken("A11: a JPEG labelled PNG is judged", lambda: ("image/png", jpeg())),
        taken("A11: an image labelled as bytes is judged", lambda: ("application/octet-stream", png())),
        taken("A11: a WebP is judged", lambda: ("image/webp", encode(COLOUR, "WEBP"))),
        taken("A16: 8x8, the smallest, is judged", lambda: image(png(8, 8))),
        taken("A17: 8192x8, the longest, is judged", lambda: image(png(8192, 8))),
        taken("A23: a CMYK JPEG is judged", lambda: image(encode(Image.fromarray(pixels(channels=4), "CMYK"), "JPEG"))),
        taken("A23: a palette PNG is judged", lambda: image(encode(COLOUR.quantize(16), "PNG"))),
        taken("A23: an RGBA PNG is judged", lambda: image(encode(Image.fromarray(pixels(channels=4)), "PNG"))),
        taken("A23: a grey PNG with alpha is judged", lambda: image(encode(Image.fromarray(pixels(channels=2), "LA"), "PNG"))),
        taken("A23: a 1-bit PNG is judged", lambda: image(encode(GREY.convert("1"), "PNG"))),
        taken("A24: a PNG with a ZIP behind it is judged", lambda: image(png() + zipped())),
        taken("A24: a JPEG with half a megabyte behind it is judged", lambda: image(jpeg() + bytes(IMAGE_BYTES // 2))),
        taken("A25: a JPEG with 15 comments of 65,533 bytes is judged", lambda: image(commented(15))),
    ],
)
def test_is_judged_and_twice_alike(client: Client, make: Callable[[], tuple[str, bytes]]) -> None:
    content_type, data = make()
    answers = [client.predict(data, content_type) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    first, second = ({key: value for key, value in answer.json().items() if key != "request_id"} for answer in answers)
    assert first == second
    assert first["prediction"] is not None


def commented(comments: int) -> bytes:
    data = jpeg()
    return data[:2] + (b"\xff\xfe" + struct.pack(">H", 65535) + b"x" * 65533) * comments + data[2:]


def explained(client: Client, data: bytes) -> object:
    return client("POST", "/v1/guards/cifar/predict?explain=true", [("Content-Type", "image/png")], data).json()["explanation"]


def test_a7_a_body_over_the_cap_in_chunks_is_refused_where_the_cap_is_passed(client: Client) -> None:
    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    body = (bytes(65536) for _ in range(10_000))
    response = client("POST", "/v1/guards/cifar/predict", [("Content-Type", "image/png")], body, on_receive=count)
    assert_problem(response, 413, "body_too_large")
    assert asked == IMAGE_BYTES // 65536 + 1


@pytest.mark.parametrize("content_type", [pytest.param("image/png", id="A8: as the body"), pytest.param(MULTIPART, id="A8: as a form")])
def test_a8_an_announced_length_over_the_cap_is_refused_before_the_body_is_read(client: Client, content_type: str) -> None:
    def read() -> None:
        raise AssertionError("the body was read")

    began = time.process_time()
    headers = [("Content-Type", content_type), ("Content-Length", "99999999999")]
    response = client("POST", "/v1/guards/cifar/predict", headers, b"abc", on_receive=read)
    assert_problem(response, 413, "body_too_large")
    assert time.process_time() - began < 0.05 * SLACK


def test_a13_a_png_truncated_at_every_64th_byte_is_refused(client: Client) -> None:
    data = png()
    assert len(data) > 3000
    for length in range(64, len(data), 64):
        assert_problem(client.predict(data[:length]), 422, "image_undecodable")


def test_a14_500_flipped_bits_in_the_pixels_are_refused_or_judged(client: Client) -> None:
    data, chance = png(8, 8), random.Random(0)
    first = data.index(b"IDAT") + 4
    for _ in range(500):
        flipped = bytearray(data)
        flipped[chance.randrange(first, len(data))] ^= 1 << chance.randrange(8)
        response = client.predict(bytes(flipped))
        if response.status_code != 200:
            assert_problem(response, 422, "image_undecodable")


def test_a17_9000x9000_zeros_in_236_kb_are_refused_without_being_decoded(client: Client) -> None:
    data = zeros_png(9000, 9000)
    assert len(data) < 300_000
    client.predict(png())  # whatever is loaded lazily is loaded
    before, began = resident(), time.process_time()
    assert_problem(client.predict(data), 422, "image_too_large")
    assert time.process_time() - began < 0.05 * SLACK
    assert resident() - before < 5 * 2**20


def test_a17_a_strip_that_would_be_resized_to_67_megapixels_is_refused_without_being_decoded(tmp_path: Path) -> None:
    strip = encode(Image.new("RGB", (8, 8192)), "PNG")
    assert len(strip) < 300
    with serving(make_service(tmp_path)) as client:
        resize_to(client, 256)
        client.assert_serves()  # whatever is loaded lazily is loaded
        before, began = resident(), time.process_time()
        body = assert_problem(client.predict(strip), 422, "image_too_large")
        assert time.process_time() - began < 0.05 * SLACK
        assert resident() - before < 5 * 2**20
        assert "8x8192" in body["detail"]
        assert "256x262144" in body["detail"]
        assert "25,000,000" in body["detail"]
        for data in (encode(Image.new("RGB", (8192, 8)), "PNG"), encode(Image.new("RGB", (8192, 8)), "JPEG"), raw_png(8, 8192, b"\0")):
            assert_problem(client.predict(data), 422, "image_too_large")
        batch = client("POST", PREDICT + "-batch", [("Content-Type", MULTIPART)], form(part("image", strip), part("image", png()))).json()["items"]
        assert batch[0]["problem"]["code"] == "image_too_large"
        assert batch[1]["result"]["verdict"] == "accepted"
        client.assert_serves()


def resize_to(client: Client, side: int) -> None:
    """Make the guard one that resizes the shorter side to this before the centre is cropped."""
    engine = client.service.engine
    live = engine.live("cifar")
    assert live is not None
    engine._serve(replace(live, description=replace(live.description, preprocessing=replace(live.description.preprocessing, resize=side))))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a19_a_progressive_jpeg_of_60_scans_is_judged(client: Client) -> None:
    assert client.predict(progressive(60), "image/jpeg").status_code == 200


@pytest.mark.parametrize("times", [120, 25_000])
def test_a19_one_of_more_scans_than_any_encoder_writes_is_refused_without_being_decoded(client: Client, times: int) -> None:
    data = progressive(times)
    assert len(data) < IMAGE_BYTES
    began = time.process_time()
    body = assert_problem(client.predict(data, "image/jpeg"), 422, "image_too_complex")
    assert time.process_time() - began < 0.05 * SLACK
    assert "100 scans" in body["detail"] and "save it anew" in body["detail"]


def test_a21_of_500_frames_the_first_is_judged(client: Client) -> None:
    first = encode(Image.fromarray(pixels(16, 16)), "PNG")
    assert explained(client, apng(500)) == explained(client, first)


def test_a22_garbage_in_exif_changes_nothing(client: Client) -> None:
    data = jpeg()
    garbage = b"Exif\0\0" + random.Random(0).randbytes(60_000)
    spoiled = data[:2] + b"\xff\xe1" + struct.pack(">H", len(garbage) + 2) + garbage + data[2:]
    assert explained(client, spoiled) == explained(client, data)


def test_a22_the_exif_orientation_is_not_applied_as_training_loaders_do_not(client: Client) -> None:
    assert explained(client, jpeg(exif=exif(6))) == explained(client, jpeg())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param("L", GREY, id="A23: grey is repeated"),
        pytest.param("RGBA", Image.fromarray(pixels(channels=4)), id="A23: alpha is dropped"),
        pytest.param("P", COLOUR.quantize(16), id="A23: a palette is looked up"),
    ],
)
def test_a23_the_conversion_is_that_of_pillow_and_so_of_training(name: str, source: Image.Image) -> None:
    assert source.mode == name
    assert decode(encode(source, "PNG")).tobytes() == source.convert("RGB").tobytes()


def test_a23_a_palette_with_transparency_is_judged(client: Client) -> None:
    assert client.predict(encode(COLOUR.quantize(16), "PNG", transparency=bytes(range(16)))).status_code == 200


def test_a28_a_compressed_body_is_refused(client: Client) -> None:
    assert_problem(client.predict(png(), "image/png", ("Content-Encoding", "gzip")), 415, "content_encoding")


def test_a28_identity_is_no_compression(client: Client) -> None:
    assert client.predict(png(), "image/png", ("Content-Encoding", "Identity")).status_code == 200


class Broken(Engine):
    """Computes what it should but for one figure, which the test sets."""

    wrong: dict[str, float]

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        # As the engine decides it: a comparison with NaN is false, so "not at least the threshold" rejects.
        outcomes = [replace(outcome, **self.wrong) for outcome in super().run(live, pixels)]
        return [replace(outcome, rejected=not outcome.score >= live.threshold.value) for outcome in outcomes]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"score": float("nan")}, id="A31: a score that is NaN"),
        pytest.param({"score": float("inf")}, id="A31: a score that is infinite"),
        pytest.param({"confidence": float("nan")}, id="A31: a confidence that is NaN"),
    ],
)
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a31_no_prediction_leaves_without_a_finite_score(tmp_path: Path, wrong: dict[str, float], mode: str) -> None:
    with serving(make_service(tmp_path, Broken)) as client:
        assert isinstance(client.service.engine, Broken)
        client.service.engine.wrong = wrong
        assert client.json("PATCH", "/v1/guards/cifar", f'{{"mode": "{mode}"}}').status_code == 200
        assert_problem(client.predict(png()), 503, "score_not_finite")
        batch = client("POST", "/v1/guards/cifar/predict-batch", [("Content-Type", MULTIPART)], form(part("image", png())))
        assert batch.json()["items"][0]["result"] is None
        assert 'verdict="accepted"} 1.0' not in client("GET", "/metrics").text


def test_a31_weights_that_make_nan_are_refused_by_the_real_engine(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "guards")
    registry.activate("cifar", publish(registry, seed=31))  # weights of its own, since what serves them is not made anew for the next test
    with serving(make_service(tmp_path, registry=registry)) as client:
        live = client.service.engine.live("cifar")
        assert live is not None
        (bias,) = (value for name, value in live.network.named_parameters() if name.endswith("auxiliary.linear.bias"))
        with torch.no_grad():
            bias.fill_(float("nan"))
        assert_problem(client.predict(png()), 503, "score_not_finite")


@pytest.mark.parametrize(
    "filename",
    [
        pytest.param("../../etc/passwd", id="A32: a path"),
        pytest.param("a\0b.png", id="A32: a NUL"),
        pytest.param("x" * 3000, id="A32: 3 KB"),
        pytest.param("\u202egnp.exe", id="A32: a right-to-left override"),
        pytest.param("", id="A32: empty"),
    ],
)
def test_a32_the_file_name_is_not_looked_at(client: Client, capfd: pytest.CaptureFixture[str], filename: str) -> None:
    response = client.predict(form(part("image", png(), filename)), MULTIPART)
    assert response.status_code == 200, response.text
    assert explained_part(client, filename) == explained(client, png())
    said = "".join(capfd.readouterr()) + response.text
    assert not filename or filename not in said


def explained_part(client: Client, filename: str) -> object:
    body = form(part("image", png(), filename))
    return client("POST", "/v1/guards/cifar/predict?explain=true", [("Content-Type", MULTIPART)], body).json()["explanation"]


def test_a32_a_file_name_of_10_kb_is_refused_as_too_long_a_head(client: Client) -> None:
    assert_problem(client.predict(form(part("image", png(), "x" * 10_000)), MULTIPART), 400, "multipart_invalid")


def test_p4_a_bad_image_in_a_batch_changes_nothing_for_its_neighbours(client: Client) -> None:
    def items(*images: bytes) -> list[dict[str, object]]:
        body = form(*(part("image", data) for data in images))
        answer: httpx.Response = client("POST", "/v1/guards/cifar/predict-batch?explain=true", [("Content-Type", MULTIPART)], body)
        assert answer.status_code == 200
        return list(answer.json()["items"])

    first, bad, empty, last = items(png(seed=1), png()[:100], b"", png(seed=2))
    assert [item["problem"]["code"] for item in (bad, empty)] == ["image_undecodable"] * 2  # type: ignore[index]
    assert (bad["result"], first["problem"], last["problem"]) == (None, None, None)
    alone = items(png(seed=1))[0]
    assert first["result"]["explanation"]["score"] == pytest.approx(alone["result"]["explanation"]["score"], abs=1e-5)  # type: ignore[index]


def test_p5_one_image_of_a_batch_is_held_to_the_cap_of_an_image(client: Client) -> None:
    body = form(part("image", bytes(IMAGE_BYTES + 1)), part("image", png()))
    assert_problem(client("POST", "/v1/guards/cifar/predict-batch", [("Content-Type", MULTIPART)], body), 413, "body_too_large")
