"""Owns one HTTP/1.1 connection, from its first byte until a complete message reaches the application and the answer has left: the receive
deadline, the caps on the request head, the framing rules, and the write deadline. It refuses a message that does not arrive in time (408),
a head that is too large (414, 431), none or two Hosts (400), protocol upgrades (400), and every framing that two parsers could read in two
ways (400). Once refused, a connection is never parsed again: it is answered, drained for a moment and closed. What comes in vain while there
is too much traffic is answered here as well (429), but keeps its connection."""

import asyncio
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service import tcp
from service.caller import CALLER, Caller, caller_of
from service.errors import HeadersTooLarge, HostHeader, MethodNotAllowed, PipelineTooDeep, ReceiveTimeout, UpgradeRefused, UriTooLong, render
from service.receive_clock import ReceiveClock

PIECE_BYTES = 16 * 1024  # what the parser is fed at once: nothing unbounded can gather inside it between two checks
PROGRESS_BYTES = 64 * 1024  # an upload, or a reader, that moves less than this in its period has stalled
LINGER_SECONDS = 1.0  # closing with unread bytes resets the connection, and the peer would lose the refusal
HOST = re.compile(rb"(?:[A-Za-z0-9._%-]+|\[[0-9A-Fa-f:.%]+\])(?::[0-9]*)?")


@dataclass(frozen=True)
class ProtocolLimits:
    """What one connection may cost. Times in seconds, sizes in bytes."""

    receive_seconds: float = 10.0  # one whole message, from its first byte; a silent connection, from its opening
    upload_seconds: float = 120.0  # under the prefixes, once the head is in: no limit in all, but this long for every PROGRESS_BYTES
    upload_prefixes: tuple[str, ...] = ()
    header_bytes: int = 32 * 1024
    header_lines: int = 100
    uri_bytes: int = 8 * 1024
    write_seconds: float = 30.0
    pipelined: int = 128  # a queued message costs a hundred times its bytes


PROBLEMS = {problem.code: problem for problem in (ReceiveTimeout, UriTooLong, HeadersTooLarge, HostHeader, UpgradeRefused, PipelineTooDeep, MethodNotAllowed)}


Headers = Sequence[tuple[bytes, bytes]]
Refusal = tuple[Headers, bytes]  # headers and body of a 429
AtTheDoor = Callable[[bytes, bytes, Headers, float], Refusal | None]  # method, URL, headers, seconds that they waited to be read -> a refusal, or come in


class Answered:
    """Stands where uvicorn has the cycle of a message: this one was answered without the application."""

    response_started = response_complete = True
    disconnected = False
    message_event = asyncio.Event()  # nobody waits for it


ANSWERED = Answered()
UNREAD = "badexpert.unread"  # extension of a scope: for how many seconds the head was here before it was read


def render_response(status: int, headers: Headers, body: bytes) -> bytes:
    """All that goes over the wire."""
    return b"".join([STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), b"\r\n", body])


def render_refusal(code: str | None, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The whole response to a refused message: a problem, or uvicorn's line for plain garbage (None)."""
    status, body = 400, b"Invalid HTTP request received."
    own = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    if code is not None:
        # The id is ours: one that came with a refused message is not to be trusted.
        answer = render(PROBLEMS[code](), uuid.uuid4().hex)
        status, body, own = answer.status_code, bytes(answer.body), answer.raw_headers
    if status == 405:
        own = [*own, (b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE")]
    return render_response(status, [*headers, *own, (b"x-content-type-options", b"nosniff"), (b"connection", b"close")], body)


def _nothing(*_: object) -> None:
    pass


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's httptools connection under `limits`; see `make_protocol`."""

    limits: ClassVar[ProtocolLimits] = ProtocolLimits()
    at_the_door: ClassVar[AtTheDoor]
    on_refusal: ClassVar[Callable[[int], None]]
    _phase: Literal["idle", "head", "body"] = "idle"
    _owed: deque[RequestResponseCycle]  # messages not answered in full, oldest first: only that one runs
    _loose = 0  # bytes fed since the parser last handed something over: what it holds back, at least
    _head_bytes = _head_lines = 0
    _upload_step: int | None = None  # bytes that are missing for the next period of an upload
    _refusal = b""
    _unsent = 0
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owed = deque()
        transport.set_write_buffer_limits(high=0)  # so that the write deadline covers every unsent byte, also while closing
        self.flow = self._clock = ReceiveClock(transport, self.loop, self._receive_expired)
        self._clock.set(self.limits.receive_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clock.close()
        self.resume_writing()
        self._unset_keepalive_if_required()
        for cycle in self._owed:  # uvicorn tells only the newest, and the one that runs would wait for ever
            cycle.disconnected = True
            cycle.message_event.set()
            caller_of(cycle.scope).leave()
        super().connection_lost(exc)

    @property
    def waits_until(self) -> float | None:
        """When it is closed if no message comes; None while one is on its way, in or out."""
        if self._phase != "idle" or self._owed or self._refusal or self.transport.is_closing():
            return None
        return self._clock.deadline if self.timeout_keep_alive_task is None else self.timeout_keep_alive_task.when()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self._refusal or self.transport.is_closing():
                return
            if self._phase == "idle" and not self._owed and self._clock.left is None:  # blank lines, which end the keep-alive timer
                self._clock.set(self.limits.receive_seconds)
            piece = data[start : start + PIECE_BYTES]
            self._loose += len(piece)
            self._unset_keepalive_if_required()
            try:
                self.parser.feed_data(piece)
            except (HttpParserError, HttpParserUpgrade):  # uvicorn would log a line, and callers without a token could fill a disk with them
                self._refuse(None)
                return
            if self._phase != "idle" and self._head_bytes + self._loose > self.limits.header_bytes:
                self._refuse("headers_too_large" if self._phase == "head" else None)  # or a chunk extension, or trailers, without end
            elif self._phase == "body" and self._upload_step is not None:
                self._upload_step -= len(piece)
                if self._upload_step <= 0:
                    self._clock.set(self.limits.upload_seconds)
                    self._upload_step = PROGRESS_BYTES

    def on_message_begin(self) -> None:
        if len(self._owed) >= self.limits.pipelined:
            self._stop_parsing("pipeline_too_deep")
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._phase = "head"
        self._loose = self._head_bytes = self._head_lines = 0
        self._upload_step = None
        self._clock.set(self.limits.receive_seconds)

    def on_url(self, url: bytes) -> None:
        self._loose = 0
        if len(self.url) + len(url) > self.limits.uri_bytes:
            self._stop_parsing("uri_too_long")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == "body":
            return  # a trailer must not become a header behind the back of the application
        self._loose = 0
        self._head_lines += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._head_lines > self.limits.header_lines or self._head_bytes > self.limits.header_bytes:
            self._stop_parsing("headers_too_large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        hosts = [value for name, value in self.headers if name == b"host"]
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.0", "1.1") or (codings and (codings != [b"chunked"] or version == "1.0")):
            self._stop_parsing(None)  # the parser lets these pass, or complains only once the application runs
        if self.parser.should_upgrade():  # it would take the body for the other protocol: a smuggled request
            self._stop_parsing("method_not_allowed" if self.parser.get_method() == b"CONNECT" else "upgrade_refused")
        if len(hosts) > 1 or not all(HOST.fullmatch(host) for host in hosts) or (version == "1.1" and not hosts):
            self._stop_parsing("host_header")
        unread = self._unread_seconds()
        if version == "1.1" and self._answers_at_the_door(unread):
            return
        self.scope["extensions"] = {UNREAD: {"seconds": unread}, CALLER: {"caller": Caller()}}  # the first for the door, should it be asked as an application
        super().on_headers_complete()
        self._phase, self._head_bytes = "body", 0
        self._owed.append(self.cycle)
        if self.scope["path"].removeprefix(self.root_path).startswith(self.limits.upload_prefixes):
            self._upload_step = PROGRESS_BYTES
            self._clock.set(self.limits.upload_seconds)
        if self.expect_100_continue:
            self._clock.hold()  # until the application asks for the body
            self.cycle.keep_alive = False  # answered without the body, the next request would be taken for it

    def _answers_at_the_door(self, unread: float) -> bool:
        """In a storm most messages end here, and a scope and a task for each would take their time from those that can still be judged."""
        if self._owed or self.flow.write_paused or self.expect_100_continue or not self.parser.should_keep_alive():
            return False
        refusal = type(self).at_the_door(self.parser.get_method(), self.url, self.headers, unread)
        if refusal is None:
            return False
        headers, body = refusal
        self.transport.write(render_response(429, [*self.server_state.default_headers, *headers], body))
        self.cycle = ANSWERED  # type: ignore[assignment] # its body is drained like that of any other message that is answered early
        self._phase, self._head_bytes = "body", 0
        self.server_state.total_requests += 1
        return True

    def _unread_seconds(self) -> float:
        """For how long the last bytes were here before they were read; while we did not want to read, none waited."""
        connection = self.transport.get_extra_info("socket")
        waited = 0.0 if connection is None else tcp.known(connection).since_received
        return min(waited, self.loop.time() - self._clock.reading_since)

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = "idle"
        self._clock.set(None)
        super().on_message_complete()
        if not self._owed:  # answered early, and its body drained: uvicorn would leave this connection without a timer
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        self._owed.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal and not self._owed:
            self._deliver()
        elif self._phase != "idle":
            self._unset_keepalive_if_required()  # the next message is on its way, under its own deadline
            if self._phase == "body" and not self._owed:  # answered early: read on, so that the peer can read the answer, not for long
                self._upload_step = None
                self._clock.set(self.limits.receive_seconds)

    def _stop_parsing(self, code: str | None) -> None:
        self._refuse(code)
        raise HttpParserError(code)

    def _receive_expired(self) -> None:
        if self._refusal or (self._phase == "body" and self.cycle.response_complete):
            self.transport.abort()  # it has its answer
        else:
            self._refuse("receive_timeout")

    def _refuse(self, code: str | None) -> None:
        if self._refusal or self.transport.is_closing():
            return
        self._clock.set(None)
        if self._phase == "body" and self.cycle.response_started:
            self.transport.close()  # an answer is out or on its way: a second one would corrupt it
            return
        self._refusal = render_refusal(code, self.server_state.default_headers)
        type(self).on_refusal(400 if code is None else PROBLEMS[code].status)
        if self._phase == "body":
            cycle = self._owed.pop()
            cycle.disconnected = True
            cycle.message_event.set()
            if self._owed:
                self.pipeline.popleft()  # it waited behind others, and must not start
        if not self._owed:
            self._deliver()

    def _deliver(self) -> None:
        self._unset_keepalive_if_required()
        self._clock.resume_reading()
        self.transport.write(self._refusal)
        if self.transport.can_write_eof():  # not under TLS
            self.transport.write_eof()
        self._clock.set(LINGER_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self._write_expired)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _write_expired(self) -> None:
        if self._unsent - self.transport.get_write_buffer_size() < PROGRESS_BYTES:
            self.transport.abort()
        else:
            self.pause_writing()


def close_waiting(connections: Iterable[object]) -> None:
    """Of those that wait for a message, close the half that has waited longest, so that others get their descriptors."""
    waiting = [(until, found) for found in connections if isinstance(found, GuardedProtocol) and (until := found.waits_until) is not None]
    waiting.sort(key=lambda pair: pair[0])
    for _, found in waiting[: (len(waiting) + 1) // 2]:
        found.transport.close()


def make_protocol(limits: ProtocolLimits, at_the_door: AtTheDoor = _nothing, on_refusal: Callable[[int], None] = _nothing) -> type[HttpToolsProtocol]:
    """The class to give to `uvicorn.Config(http=...)`, together with `ws="none"`.

    at_the_door: asked about each message whose head is complete; what it gives is the answer, and the application does not hear of the message.
    on_refusal: told the status of each message that is refused.
    """
    own = {"limits": limits, "at_the_door": staticmethod(at_the_door), "on_refusal": staticmethod(on_refusal)}
    return type("BoundProtocol", (GuardedProtocol,), own)
