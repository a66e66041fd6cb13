"""Bodies under caps: strict JSON (rows D1 to D7), multipart (rows E11 and E12), and raw bytes."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request

from models.errors import Problem
from service.bodies import Budget, Capped, Sink, parse_model, read, read_model, read_multipart, strict_json
from service.errors import BodyTooLarge, ContentEncoding, FieldsInvalid, JsonInvalid, MediaType, MultipartInvalid, Overloaded, UnexpectedField
from tests.support import BOUNDARY, MULTIPART, form, part


def request(content_type: str, *pieces: bytes, leaves: bool = False, **headers: str) -> Request:
    """A request whose body comes in these pieces; the client may leave before the last."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    given_headers = {"content-type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Request({"type": "http", "headers": [(name.encode(), value.encode("latin-1")) for name, value in given_headers.items()]}, receive)


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        pytest.param(b"{bad", JsonInvalid, id="D1: no JSON"),
        pytest.param(b"", JsonInvalid, id="D1: nothing"),
        pytest.param(b"{} {}", JsonInvalid, id="D1: two documents"),
        pytest.param(b'{"a": 1,}', JsonInvalid, id="D1: a trailing comma"),
        pytest.param(b'{"a": NaN}', FieldsInvalid, id="D2: NaN"),
        pytest.param(b"[Infinity]", FieldsInvalid, id="D2: Infinity"),
        pytest.param(b"-Infinity", FieldsInvalid, id="D2: -Infinity"),
        pytest.param(b'{"a": [1e400]}', FieldsInvalid, id="D2: 1e400"),
        pytest.param(rb'"\ud800"', FieldsInvalid, id="D3: a lone surrogate"),
        pytest.param(rb'{"a": [{"b": "x\udfff"}]}', FieldsInvalid, id="D3: a lone surrogate deep down"),
        pytest.param(rb'{"\ud800": 1}', FieldsInvalid, id="D3: a lone surrogate in a key"),
        pytest.param(b'"\xed\xa0\x80"', JsonInvalid, id="D4: a surrogate in bytes"),
        pytest.param(b'"\xff"', JsonInvalid, id="D4: invalid UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), JsonInvalid, id="D4: UTF-16"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', JsonInvalid, id="D4: a byte order mark"),
        pytest.param(b"[" * 100_000, JsonInvalid, id="D5: 100,000 open lists"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, JsonInvalid, id="D5: 100,000 nested lists"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JsonInvalid, id="D5: 100,000 nested objects"),
        pytest.param(b"9" * 5000, JsonInvalid, id="D5: an integer of 5,000 digits"),
        pytest.param(b'{"a": 1, "a": 2}', JsonInvalid, id="D6: a key twice"),
        pytest.param(b'{"b": [{"a": 1, "a": 1}]}', JsonInvalid, id="D6: a key twice deep down"),
        pytest.param(rb'{"a": 1, "\u0061": 2}', JsonInvalid, id="D6: a key twice, once escaped"),
    ],
)
def test_json_that_two_readers_could_read_in_two_ways_is_refused(data: bytes, refusal: type[Problem]) -> None:
    with pytest.raises(refusal):
        strict_json(data)


@pytest.mark.parametrize("depth", [10, 400, 900, 2000])
def test_d5_any_depth_is_read_or_refused(depth: int) -> None:
    try:
        strict_json(b"[" * depth + b'"x"' + b"]" * depth)
    except JsonInvalid:
        assert depth > 100


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@example(b'{"a":"\\ud83d\\ude00"}')
def test_any_bytes_are_read_as_the_library_reads_them_or_refused(data: bytes) -> None:
    try:
        value = strict_json(data)
    except (JsonInvalid, FieldsInvalid):
        return
    assert value == json.loads(data)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_value_comes_back_as_it_was_sent(value: object, ascii_only: bool) -> None:
    assert strict_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


class Sample(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    rate: float | None = Field(None, gt=0, le=0.2)
    mode: str = "enforce"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"null", id="D1: null"),
        pytest.param(b"[]", id="D1: a list"),
        pytest.param(b'"x"', id="D1: a text"),
        pytest.param(b'{"rte": 0.1}', id="D7: an unknown key"),
        pytest.param(b'{"__proto__": {}}', id="D7: __proto__"),
        pytest.param(b'{"__class__": "x"}', id="D7: __class__"),
        pytest.param(b'{"rate": 0}', id="D8: 0"),
        pytest.param(b'{"rate": 1}', id="D8: 1"),
        pytest.param(b'{"rate": -0.1}', id="D8: -0.1"),
        pytest.param(b'{"rate": 0.5}', id="D8: 0.5"),
        pytest.param(b'{"rate": "0.01"}', id="D8: a number in quotes"),
        pytest.param(b'{"rate": true}', id="D8: true"),
        pytest.param(b'{"rate": ' + b"9" * 4000 + b"}", id="D8: an integer beyond any float"),
        pytest.param(b'{"mode": 1}', id="a number for a text"),
    ],
)
def test_fields_that_do_not_fit_are_refused(data: bytes) -> None:
    with pytest.raises(FieldsInvalid):
        parse_model(Sample, data)


def test_a_refusal_names_the_field_and_never_echoes_the_value() -> None:
    with pytest.raises(FieldsInvalid) as refusal:
        parse_model(Sample, json.dumps({"rate": "sesame-value", "mode": 7, "x\n" + "y" * 200: 1}).encode())
    assert [error["field"] for error in refusal.value.errors] == ["rate", "mode", "x?" + "y" * 58]
    assert "sesame-value" not in f"{refusal.value.errors} {refusal.value.detail}"


def test_a_thousand_wrong_fields_are_not_all_listed() -> None:
    with pytest.raises(FieldsInvalid) as refusal:
        parse_model(Sample, json.dumps({f"x{i}": 1 for i in range(1000)}).encode())
    assert len(refusal.value.errors) == 20
    assert len(refusal.value.detail) < 1000


@pytest.mark.parametrize(
    "content_type", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonx", "text/json"], ids=lambda kind: f"D11: {kind!r}"
)
def test_json_must_be_called_json(content_type: str) -> None:
    with pytest.raises(MediaType):
        asyncio.run(read_model(request(content_type, b"{}"), Sample, 100))


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_called_json_is_read_in_any_pieces(content_type: str) -> None:
    assert asyncio.run(read_model(request(content_type, b'{"ra', b"", b'te": 0.1}'), Sample, 100)).rate == 0.1


@pytest.mark.parametrize("pieces", [[b"x" * 101], [b"x"] * 101, [b"x" * 100, b"x"]], ids=["in one piece", "byte by byte", "in two pieces"])
def test_a_body_over_its_cap_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(BodyTooLarge):
        asyncio.run(read(request("image/png", *pieces), 100))


def test_a_body_of_just_its_cap_is_read() -> None:
    assert asyncio.run(read(request("image/png", *[b"x"] * 100, content_length="100"), 100)) == b"x" * 100


def test_an_announced_length_over_the_cap_is_refused_before_anything_is_read() -> None:
    unread = Request({"type": "http", "headers": [(b"content-length", b"101")]})  # to read it would raise RuntimeError
    with pytest.raises(BodyTooLarge):
        asyncio.run(read(unread, 100))


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity", ""])
def test_a_compressed_body_is_refused(encoding: str) -> None:
    with pytest.raises(ContentEncoding):
        asyncio.run(read(request("image/png", b"x", content_encoding=encoding), 100))


def test_a_client_that_leaves_ends_the_reading() -> None:
    with pytest.raises(ClientDisconnect):
        asyncio.run(read(request("image/png", b"x", leaves=True), 100))


def test_p5_what_all_requests_keep_is_bounded_and_given_back() -> None:
    budget = Budget(100)
    with budget.hold() as first:
        assert asyncio.run(read(request("image/png", b"x" * 50, b"x" * 10), 100, first)) == b"x" * 60
        with budget.hold() as second:
            part_of_it = Capped("image", 100, second)
            part_of_it.write(b"x" * 40)
            assert budget.held == 100
            for refused in (lambda: part_of_it.write(b"x"), lambda: asyncio.run(read(request("image/png", b"x"), 100, first))):
                with pytest.raises(Overloaded):
                    refused()
            assert part_of_it.getvalue() == b"x" * 40
        assert budget.held == 60
    assert budget.held == 0


def test_p5_a_refusal_by_the_cap_takes_nothing_of_the_budget() -> None:
    budget = Budget(100)
    with budget.hold() as hold:
        with pytest.raises(BodyTooLarge):
            Capped("image", 10, hold).write(b"x" * 11)
        assert budget.held == 0


Parts = list[tuple[str, bool, bytes]]


def multipart(data: bytes | Iterable[bytes], content_type: str = MULTIPART, most: int = 3, cap: int = 10**7, blocking: bool = False) -> Parts:
    found: list[tuple[str, bool, Capped]] = []

    def open_part(name: str, is_file: bool) -> Sink:
        if name == "unwanted":
            raise UnexpectedField
        found.append((name, is_file, Capped(name, 1000)))
        return found[-1][2]

    pieces = [data] if isinstance(data, bytes) else data
    asyncio.run(read_multipart(request(content_type, *pieces), open_part, cap=cap, parts=most, blocking=blocking))
    return [(name, is_file, sink.getvalue()) for name, is_file, sink in found]


@pytest.mark.parametrize("blocking", [False, True], ids=["on the event loop", "off the event loop"])
def test_parts_go_to_their_sinks_in_order(blocking: bool) -> None:
    data = form(part("a", b"1\r\n--2"), part("b", b"", None), part("a", b"\0" * 500, ""))
    wanted = [("a", True, b"1\r\n--2"), ("b", False, b""), ("a", True, b"\0" * 500)]
    assert multipart(data, blocking=blocking) == wanted
    assert multipart([data[at : at + 1] for at in range(len(data))]) == wanted


@pytest.mark.parametrize("data", [form(part("a", b"1")), part("a", b"1"), form(part("a", b"1"), part("unwanted", b"2"))], ids=["read", "cut off", "refused"])
def test_p5_what_the_parts_held_is_gone_with_the_request_and_waits_for_no_collection(data: bytes) -> None:
    class Part(Capped):
        pass

    made = []

    def open_part(name: str, _: bool) -> Sink:
        if name == "unwanted":
            raise UnexpectedField
        sink = Part(name, 1000)
        made.append(weakref.ref(sink))
        return sink

    async def receive() -> None:
        with suppress(Problem):
            await read_multipart(request(MULTIPART, data), open_part, cap=10**7, parts=3, blocking=False)

    gc.disable()
    try:
        asyncio.run(receive())
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_the_boundary_may_be_quoted_and_the_ends_may_hold_noise() -> None:
    assert multipart(form(part("a", b"1")) + b"noise behind the end", f'Multipart/Form-Data; boundary="{BOUNDARY}"') == [("a", True, b"1")]


ONE = part("a", b"1")


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        pytest.param("multipart/form-data", form(ONE), id="E11: no boundary"),
        pytest.param("multipart/form-data; boundary=", form(ONE), id="E11: an empty boundary"),
        pytest.param(f"multipart/form-data; boundary={'b' * 300}", form(ONE), id="E11: a boundary of 300 characters"),
        pytest.param(MULTIPART, ONE, id="E11: never closed"),
        pytest.param(MULTIPART, form(ONE)[:-4], id="E11: closed but for its last bytes"),
        pytest.param(MULTIPART, b"", id="E11: empty"),
        pytest.param("multipart/form-data; boundary=another", form(ONE), id="E11: a wrong boundary"),
        pytest.param(MULTIPART, b"no multipart at all", id="E11: no multipart"),
        pytest.param(MULTIPART, form(part("a", b"1", None, "Content-Type: multipart/mixed; boundary=x")), id="E11: nested"),
        pytest.param(MULTIPART, form(*[ONE] * 1001), id="E12: 1,001 files"),
        pytest.param(MULTIPART, form(part("a", b"1", "f", *["X: y"] * 8)), id="E12: nine part headers"),
        pytest.param(MULTIPART, form(part("a", b"1", "f", "X: " + "y" * 5000)), id="E12: a part header of 5 KB"),
        pytest.param(MULTIPART, form(part("a", b"1", "f", "X" * 5000 + ": y")), id="E12: a part header name of 5 KB"),
        pytest.param(MULTIPART, form(part("", b"1")), id="E12: an empty name"),
        pytest.param(MULTIPART, form(ONE.replace(b'; name="a"', b"")), id="E12: no name"),
        pytest.param(MULTIPART, form(ONE.replace(b"form-data", b"attachment")), id="E12: another disposition"),
        pytest.param(MULTIPART, form(ONE.replace(b"Content-Disposition", b"Content-Position")), id="E12: no disposition"),
        pytest.param(MULTIPART, form(ONE.replace(b": form", b"\0 form")), id="E12: a NUL in a part header"),
        pytest.param(MULTIPART, form(ONE.replace(b"\r\n\r\n", b"\n\n")), id="E12: bare line feeds"),
    ],
)
def test_malformed_multipart_is_refused(content_type: str, data: bytes) -> None:
    with pytest.raises(MultipartInvalid):
        multipart(data, content_type)


def test_what_open_part_refuses_is_refused_as_it_says() -> None:
    with pytest.raises(UnexpectedField):
        multipart(form(part("a", b"1"), part("unwanted", b"1")))


def test_a_part_over_its_cap_is_refused() -> None:
    with pytest.raises(BodyTooLarge):
        multipart(form(part("a", b"x" * 1001)))


def test_noise_behind_the_end_counts_towards_the_cap() -> None:
    with pytest.raises(BodyTooLarge):
        multipart([form(ONE), *[b"x" * 1000] * 20], cap=10_000)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_spoiled_multipart_is_read_or_refused_and_never_anything_else(data: st.DataObject) -> None:
    body = bytearray(form(part("a", b"1" * 50), part("b", b"\r\n--" * 10, None)))
    spoil: dict[str, Callable[[int], None]] = {
        "change": lambda at: body.__setitem__(at, data.draw(st.integers(0, 255))),
        "cut": lambda at: body.__delitem__(slice(at, None)),
        "remove": lambda at: body.__delitem__(slice(at, at + data.draw(st.integers(1, 20)))),
        "insert": lambda at: body.__setitem__(slice(at, at), data.draw(st.binary(max_size=20))),
    }
    for kind in data.draw(st.lists(st.sampled_from(sorted(spoil)), min_size=1, max_size=3)):
        if body:
            spoil[kind](data.draw(st.integers(0, len(body) - 1)))
    with suppress(MultipartInvalid, BodyTooLarge):
        multipart(bytes(body))
