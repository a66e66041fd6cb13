"""A real uvicorn under `service.protocol` in a thread, with an application that tells what it got, spoken to over raw sockets."""

import asyncio
import contextlib
import socket
import threading
import time
from typing import Any

import uvicorn

from service.caller import Caller, caller_of
from service.protocol import UNREAD, AtTheDoor, ProtocolLimits, make_protocol

LIMITS = ProtocolLimits(receive_seconds=0.3, upload_seconds=0.3, upload_prefixes=("/upload",), write_seconds=0.3)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CL, TE, CLOSE, LAST = b"Content-Length: ", b"Transfer-Encoding: ", b"Connection: close\r\n\r\n", b"0\r\n\r\n"
Answer = tuple[int, dict[str, str], bytes]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers `METHOD path bytes`; over 1 GB and /early unread; /late reads after 0.4 s; /now does not wait; /flood is 128 MB; /hang awaits the disconnect."""
    path, length = scope["path"], int(dict(scope["headers"]).get(b"content-length", 0))
    if path != "/now":
        await asyncio.sleep(0.4 if path == "/late" else 0)
    before, size, message = list(scope["headers"]), 0, {"type": "http.request", "more_body": length <= 10**9 and path != "/early"}
    while message["type"] == "http.request" and (message["more_body"] or path == "/hang"):
        message = await receive()
        size += len(message.get("body", b""))
    if message["type"] == "http.disconnect":
        return
    body = b"%s %s %d" % (scope["method"].encode(), path.encode(), size) if path != "/big" else b"x" * 2**24
    body = body if path != "/fits" else b"x" * 2**15  # less than uvicorn's high-water mark: only the write deadline sees it
    status = 413 if length > 10**9 else 200 if scope["headers"] == before else 500  # the headers of a running request stay as they are
    headers = [] if path == "/flood" else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for _ in range(512 if path == "/flood" else 0):
        await send({"type": "http.response.body", "body": b"x" * 2**18, "more_body": True})
    await send({"type": "http.response.body", "body": body})


class Served:
    """The server in a thread, with a clean bill of health on demand."""

    def __init__(self, limits: ProtocolLimits = LIMITS, at_the_door: AtTheDoor = lambda *_: None) -> None:
        self.calls, self.unread, self.callers, self.refused = 0, list[float](), list[Caller](), list[int]()
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            port=0,
            http=make_protocol(limits, at_the_door, lambda status: self.refused.append(status)),
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=1,
        )
        self.uvicorn = uvicorn.Server(config)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.uvicorn.serve(),), daemon=True)
        self.thread.start()
        self.until(lambda: self.uvicorn.started)
        self.port: int = self.uvicorn.servers[0].sockets[0].getsockname()[1]

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        self.unread.append(scope["extensions"][UNREAD]["seconds"])
        self.callers.append(caller_of(scope))
        await echo(scope, receive, send)

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        client = socket.socket()
        client.settimeout(5)
        if receive_buffer:  # only before connecting
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", self.port))
        return client

    def narrow(self) -> asyncio.Transport:
        """The only connection's own end, which hands the kernel little at a time: what a client does not read gathers here."""
        self.until(lambda: self.uvicorn.server_state.connections)
        (connection,) = self.uvicorn.server_state.connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
        return connection.transport  # type: ignore[return-value]

    @property
    def idle(self) -> bool:
        return not self.uvicorn.server_state.connections and not self.uvicorn.server_state.tasks

    @staticmethod
    def until(condition: Any, seconds: float = 3.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)

    def stop(self) -> float:
        begin = time.monotonic()
        self.uvicorn.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.loop.close()
        return time.monotonic() - begin


def talk(client: socket.socket, *steps: bytes | float) -> bytes:
    """Takes the steps, then reads until the server closes or has said nothing for long; a server that stops reading is no failure."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for step in steps:
            if isinstance(step, bytes):
                client.sendall(step)
            else:
                time.sleep(step)
    raw = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(2**16):
            raw += piece
    return raw


def answers(raw: bytes) -> list[Answer]:
    found: list[Answer] = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        found.append((int(lines[0].split()[1]), headers, raw[:length]))
        raw = raw[length:]
    return found


def ask(client: socket.socket, request: bytes) -> Answer:
    """One answer with a Content-Length, from a connection that may stay open."""
    client.sendall(request)
    raw = b""
    while b"\r\n\r\n" not in raw or len(answers(raw)[0][2]) < int(answers(raw)[0][1]["content-length"]):
        piece = client.recv(2**16)
        assert piece, raw
        raw += piece
    return answers(raw)[0]
