"""Owns the reading and decoding of posted images, whose bytes are bounded in all; off the event loop, a bounded number at a time, the smallest at once."""

from __future__ import annotations

import asyncio
import math

from starlette.requests import Request
from torch import Tensor

from models.preprocessing import Preprocessing, decode
from service.bodies import Budget, Capped, Hold, Sink, media_type, read, read_multipart
from service.errors import BodyEmpty, DeadlineExceeded, ImageMissing, MediaType, OneImageOnly, Overloaded, TooManyImages, UnexpectedField
from service.priority import working

SMALL_BYTES, SMALL_PIXELS = 8 * 1024, 64 * 64
_LONG_TO_READ = (b"iCCP", b"iTXt", b"zTXt")  # chunks of a PNG that may unpack to a thousand times their size


class Images:
    """Reads image bodies and turns them into the suspect's pixels."""

    def __init__(self, *, image_bytes: int, batch_images: int, body_bytes: int, workers: int, pending: int) -> None:
        """body_bytes: of all that was read and is not answered yet."""
        self._image_bytes, self._batch_images, self._pending = image_bytes, batch_images, pending
        self.budget = Budget(body_bytes)
        self._pool = working(workers, "decode")
        self._decoding = 0

    async def one(self, request: Request, hold: Hold) -> bytes:
        """The image of a predict call: the body itself, or the multipart part `image`. Raises Overloaded where too many bytes are held already."""
        kind = media_type(request)
        if kind == "multipart/form-data":
            return (await self._parts(request, 1, hold))[0]
        if kind and not kind.startswith("image/") and kind != "application/octet-stream":
            raise MediaType("Send the image itself with its type (`Content-Type: image/png`), or multipart/form-data with a part named `image`.")
        body = await read(request, self._image_bytes, hold)
        if not body:
            raise BodyEmpty
        return body

    async def several(self, request: Request, hold: Hold) -> list[bytes]:
        """The images of a predict-batch call: the multipart parts named `image`, in order. Raises Overloaded, as `one` does."""
        if media_type(request) != "multipart/form-data":
            raise MediaType("Send multipart/form-data with one part named `image` for each image.")
        return await self._parts(request, self._batch_images, hold)

    async def pixels(self, data: bytes, preprocessing: Preprocessing, deadline: float, *, alone: bool) -> Tensor:
        """uint8 [3, size, size]. Raises ImageProblem, Overloaded where too many images wait to be decoded, or DeadlineExceeded.

        deadline: by the event loop's clock. alone: no other image came with it; of many, the event loop would decode one after the other, and nobody else
        would be heard meanwhile.
        """
        if alone and is_small(data, preprocessing):
            return preprocessing.pixels(decode(data, preprocessing))
        if self._decoding >= self._pending:
            raise Overloaded
        self._decoding += 1
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: preprocessing.pixels(decode(data, preprocessing)))
        except TimeoutError:
            raise DeadlineExceeded from None
        finally:
            self._decoding -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _parts(self, request: Request, most: int, hold: Hold) -> list[bytes]:
        found: list[Capped] = []

        def open_part(name: str, is_file: bool) -> Sink:
            if name != "image":
                raise UnexpectedField("This call takes file parts named `image` and nothing else.")
            if not is_file:
                raise ImageMissing("The part `image` is text; send it as a file.")
            if len(found) == most:
                raise OneImageOnly if most == 1 else TooManyImages(f"One request takes at most {most} images.")
            found.append(Capped("image", self._image_bytes, hold))
            return found[-1]

        overhead = 8 * 1024 * (most + 1)
        await read_multipart(request, open_part, cap=self._image_bytes * most + overhead, parts=most + 2, blocking=False)
        if not found:
            raise ImageMissing
        images = [sink.getvalue() for sink in found]
        if most == 1 and not images[0]:
            raise BodyEmpty
        return images


def is_small(data: bytes, preprocessing: Preprocessing) -> bool:
    """Whether an image is made into pixels in less time than it takes to ask another thread and to hear of it.

    Told of PNGs alone, by the size at their beginning: whatever follows, no more than that is unpacked. What it is resized to counts as well, since
    of a strip of 8x512 pixels a shorter side of 64 makes 64 times as many.
    """
    if len(data) > SMALL_BYTES or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or data.count(b"IHDR") > 1:
        return False
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not 0 < width * height <= SMALL_PIXELS or any(chunk in data for chunk in _LONG_TO_READ):
        return False
    return max(preprocessing.size**2, math.prod(preprocessing.resized(width, height))) <= SMALL_PIXELS
