"""Request bodies, read under caps: raw bytes, strict JSON, and multipart whose parts go straight to where they belong.

A body is refused by its announced length before a byte is read, and by its real length as it streams in. Part names and file names are
looked at, never used as paths, logged or echoed. What is kept of bodies in memory counts towards a budget of all of them.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, Self, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from models.durable import storage_errors
from service.errors import BodyTooLarge, ContentEncoding, FieldsInvalid, JsonInvalid, MediaType, MultipartInvalid, Overloaded

LONGEST_BOUNDARY, MOST_PART_HEADERS, PART_HEADER_BYTES = 200, 8, 4096
Model = TypeVar("Model", bound=BaseModel)


class Budget:
    """How many bytes of bodies are in memory, of all requests that are under way, and how many may be."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def hold(self) -> Hold:
        return Hold(self)


class Hold:
    """Around one request, from before its body is read until it is answered: what it takes of the budget is given back however it ends."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._taken = budget, 0

    def take(self, count: int) -> None:
        """Before these bytes are kept. Raises Overloaded where they are too many."""
        if self._budget.held + count > self._budget.most:
            raise Overloaded("The images that are being sent and judged take all the memory that they may; try again shortly.")
        self._budget.held += count
        self._taken += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.held -= self._taken
        self._taken = 0


class Sink(Protocol):
    """Where the bytes of a part go."""

    def write(self, data: bytes, /) -> object: ...


class Capped:
    """A part that is kept in memory, under a cap, and of a budget where there is a hold on one."""

    def __init__(self, name: str, cap: int, hold: Hold | None = None) -> None:
        self._data, self._left, self._hold = io.BytesIO(), cap, hold
        self._too_large = f"The part `{name}` is larger than the {cap:,} bytes that are taken."

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise BodyTooLarge(self._too_large)
        if self._hold is not None:
            self._hold.take(len(data))
        self._data.write(data)

    def getvalue(self) -> bytes:
        return self._data.getvalue()


OpenPart = Callable[[str, bool], Sink]  # (part name, is a file) -> sink; raises a Problem for a part that is not wanted


def media_type(request: Request) -> str:
    """The type and subtype of the body, lower case, without parameters; empty where none is given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def stream(request: Request, cap: int) -> AsyncIterator[bytes]:
    """The body in pieces, at most `cap` bytes of it. Raises BodyTooLarge, before anything is read where the length is announced."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ContentEncoding
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > cap:
        raise _too_large(cap)
    total = 0
    async for piece in request.stream():
        total += len(piece)
        if total > cap:
            raise _too_large(cap)
        if piece:
            yield piece


def _too_large(cap: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the {cap:,} bytes that this call takes.")


async def read(request: Request, cap: int, hold: Hold | None = None) -> bytes:
    """The whole body, which is of a budget where there is a hold on one."""
    body = bytearray()  # a list of pieces would cost forty times the cap where each is one byte
    async for piece in stream(request, cap):
        if hold is not None:
            hold.take(len(piece))
        body += piece
    return bytes(body)


async def read_model(request: Request, model: type[Model], cap: int) -> Model:
    """A JSON body as a pydantic model. Raises MediaType, JsonInvalid or FieldsInvalid."""
    if media_type(request) != "application/json":
        raise MediaType("This call takes JSON; send it as `Content-Type: application/json`.")
    return parse_model(model, await read(request, cap))


def parse_model(model: type[Model], data: bytes) -> Model:
    """Strict JSON into a pydantic model."""
    value = strict_json(data)
    if not isinstance(value, dict):
        raise FieldsInvalid("A JSON object is expected.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fields = [
            {"field": _clean(".".join(map(str, item["loc"]))), "message": item["msg"].removeprefix("Value error, ")}
            for item in error.errors(include_input=False)[:20]
        ]
        summary = "; ".join(f"{item['field']}: {item['message']}" for item in fields[:3])
        raise FieldsInvalid(f"Fields not valid: {summary}.", errors=fields) from None


def strict_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8 without a mark, no duplicate keys, finite numbers, no lone surrogates."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise JsonInvalid("A key appears twice in one JSON object.")
        for key in found:
            _check_text(key)
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise FieldsInvalid("A number is not finite.")
        return value

    def constant(_: str) -> float:
        raise FieldsInvalid("A number is not finite.")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_float=number, parse_constant=constant)
        _check_texts(value)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise JsonInvalid from error
    return value


def _check_texts(value: Any) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            _check_texts(item)


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise FieldsInvalid("A text holds half of a surrogate pair.")


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:60]


async def read_multipart(request: Request, open_part: OpenPart, *, cap: int, parts: int, blocking: bool) -> None:
    """Feed a multipart body to the sinks that `open_part` chooses. `blocking`: sinks write to disk, so they are fed off the event loop."""
    receiver = _Receiver(_boundary(request), open_part, parts)
    try:
        async for piece in stream(request, cap):
            if blocking:
                await asyncio.to_thread(receiver.feed, piece)
            else:
                receiver.feed(piece)
        receiver.finish()
    finally:
        receiver.close()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= LONGEST_BOUNDARY:
        raise MultipartInvalid("The multipart body has no usable boundary.")
    return boundary


class _Receiver:
    """The callbacks of python-multipart around one open part."""

    def __init__(self, boundary: bytes, open_part: OpenPart, parts: int) -> None:
        self._open_part, self._parts_left, self._complete = open_part, parts, False
        self._sink: Sink | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._field, self._value, self._header_bytes = b"", b"", 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        try:
            with storage_errors():
                self._parser.write(piece)
        except MultipartParseError as error:
            raise MultipartInvalid from error

    def finish(self) -> None:
        if not self._complete:
            raise MultipartInvalid("The multipart body ends before its closing boundary.")

    def close(self) -> None:
        """It and its parser know each other: without this, all that the sinks hold would stay until the next collection, which is seldom."""
        del self._parser

    def _begin(self) -> None:
        self._parts_left -= 1
        if self._parts_left < 0:
            raise MultipartInvalid("The multipart body has more parts than this call takes.")
        self._headers, self._field, self._value, self._header_bytes = [], b"", b"", 0

    def _count(self, data: bytes) -> bytes:
        self._header_bytes += len(data)
        if self._header_bytes > PART_HEADER_BYTES or len(self._headers) >= MOST_PART_HEADERS:
            raise MultipartInvalid("A part of the multipart body has too long a head.")
        return data

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += self._count(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._count(data[start:end])

    def _header_end(self) -> None:
        self._headers.append((self._field.lower(), self._value))
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        disposition = dict(self._headers).get(b"content-disposition", b"")
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or not options.get(b"name"):
            raise MultipartInvalid("A part of the multipart body has no name.")
        if dict(self._headers).get(b"content-type", b"").lower().startswith(b"multipart/"):
            raise MultipartInvalid("A part of the multipart body is multipart itself.")
        self._sink = self._open_part(options[b"name"].decode("utf-8", "replace"), b"filename" in options)

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._sink is not None  # a part's data follows its head
        self._sink.write(data[start:end])

    def _end(self) -> None:
        self._complete = True


__all__ = [
    "Budget",
    "Capped",
    "ClientDisconnect",
    "Hold",
    "OpenPart",
    "Sink",
    "media_type",
    "parse_model",
    "read",
    "read_model",
    "read_multipart",
    "stream",
    "strict_json",
]
