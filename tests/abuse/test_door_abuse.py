"""What is refused at the door is answered by the protocol itself: its connection goes on as if the application had answered, and nothing gathers.

Driven under a real uvicorn with raw sockets; whatever is asked of /full is refused there.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from service.protocol import Headers, Refusal
from tests.served import CL, CLOSE, GET, LAST, LIMITS, TE, Served, answers, ask, talk

FULL = b"POST /full HTTP/1.1\r\nHost: a\r\n"
REFUSED = (429, b"no room")
SERVED = (200, b"GET / 0")
waits: list[float] = []  # of those that were refused: for how long they were here unread


def at_the_door(method: bytes, url: bytes, headers: Headers, waited: float) -> Refusal | None:
    if url != b"/full":
        return None
    waits.append(waited)
    return [(b"content-length", b"7"), (b"x-method", method)], b"no room"


@pytest.fixture(scope="module")
def module_server() -> Iterator[Served]:
    served = Served(LIMITS, at_the_door)
    yield served
    served.stop()


@pytest.fixture
def server(module_server: Served) -> Iterator[Served]:
    """It has forgotten everything when a test is over, and serves."""
    yield module_server
    module_server.until(lambda: module_server.idle)
    with module_server.connect() as client:
        assert ask(client, GET)[::2] == SERVED
    module_server.until(lambda: module_server.idle)


def busy(server: Served, seconds: float) -> None:
    """Return once its event loop has begun to do something else for so long."""
    begun = threading.Event()
    server.loop.call_soon_threadsafe(lambda: (begun.set(), time.sleep(seconds)))
    assert begun.wait(5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param((FULL + CL + b"3\r\n\r\nabc", GET), [REFUSED, SERVED], id="with its body"),
        pytest.param((FULL + CL + b"3\r\n\r\n", 0.05, b"a", 0.05, b"bc" + GET), [REFUSED, SERVED], id="with a body in pieces"),
        pytest.param((FULL + CL + b"0\r\n\r\n", GET), [REFUSED, SERVED], id="without a body"),
        pytest.param((FULL + TE + b"chunked\r\n\r\n1\r\na\r\n" + LAST, GET), [REFUSED, SERVED], id="with a body in chunks"),
        pytest.param((FULL + CL + b"1000000\r\n\r\n" + b"a" * 1_000_000, GET), [REFUSED, SERVED], id="with a large body"),
        pytest.param(((FULL + CL + b"1\r\n\r\na") * 3 + GET,), [REFUSED] * 3 + [SERVED], id="three in one piece"),
        pytest.param((GET + FULL + CL + b"1\r\n\r\na" + GET,), [SERVED, (200, b"POST /full 1"), SERVED], id="behind one that runs it waits for its turn"),
        pytest.param((FULL + CL + b"1\r\n" + CLOSE + b"a",), [(200, b"POST /full 1")], id="one that ends its connection comes in"),
        pytest.param((FULL.replace(b"1.1", b"1.0") + CL + b"1\r\n\r\na",), [(200, b"POST /full 1")], id="one of HTTP/1.0 comes in"),
        pytest.param((FULL + CL + b"9\r\n\r\nabc",), [REFUSED], id="with a body that stalls"),
        pytest.param((FULL + CL + b"99\r\n\r\n", *(b"a", 0.05) * 9), [REFUSED], id="with a body that drips"),
        pytest.param((FULL + TE + b"chunked\r\n\r\nZZ",), [REFUSED], id="with a bad chunk"),
        pytest.param((FULL + TE + b"chunked\r\n\r\n" + LAST[:-2] + b"X: a\r\n" * 200_000,), [REFUSED], id="with trailers without end"),
        pytest.param((FULL + CL + b"1\r\n\r\na\x00\x01",), [REFUSED, (400, b"Invalid HTTP request received.")], id="with garbage behind it"),
    ],
)
def test_one_that_is_refused_at_the_door(server: Served, steps: tuple[bytes | float, ...], expected: list[tuple[int, bytes]]) -> None:
    calls = server.calls
    with server.connect() as client:
        assert [(status, body) for status, _, body in answers(talk(client, *steps))] == expected
    assert server.calls == calls + [status for status, _ in expected].count(200)


def test_the_answer_is_what_the_door_says_with_the_servers_own_headers(server: Served) -> None:
    with server.connect() as client:
        _, headers, _ = ask(client, FULL + CL + b"1\r\n\r\na")
        assert headers["x-method"] == "POST"
        assert set(headers) - {"x-method"} == set(ask(client, GET)[1])  # a date among them


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a connection waited")
def test_the_door_is_told_how_long_a_request_was_here_before_it_was_read(server: Served) -> None:
    with server.connect() as client:
        assert ask(client, FULL + CL + b"1\r\n\r\na")[0] == 429
        at_once = waits[-1]
        busy(server, 0.8)
        assert ask(client, FULL + CL + b"1\r\n\r\na")[0] == 429
        late = waits[-1]
    busy(server, 0.8)
    with server.connect() as client:
        assert ask(client, FULL + CL + b"1\r\n\r\na")[0] == 429
        new = waits[-1]
    assert at_once < min(late, new) / 2
    busy(server, 0.8)
    with server.connect() as client:
        assert ask(client, FULL.replace(b"1.1", b"1.0") + CL + b"1\r\n\r\na")[0] == 200
    assert at_once < server.unread[-1] / 2  # that of one that comes in


def test_what_waits_behind_others_of_its_own_connection_was_not_kept_waiting_by_the_server(server: Served) -> None:
    with server.connect() as client:
        client.sendall(b"POST /late HTTP/1.1\r\nHost: a\r\n" + CL + b"1\r\n\r\na" + b"GET /now HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.05)
        waits.clear()
        client.sendall(FULL + CL + b"1\r\n\r\na")  # is not read before the first is answered: the second ended the reading
        assert [status for status, _, _ in answers(talk(client))] == [200, 200, 429]
    assert waits[0] < 0.2


def test_one_that_asks_before_it_sends_its_body_comes_in(server: Served) -> None:
    with server.connect() as client:
        client.sendall(FULL + b"Expect: 100-continue\r\n" + CL + b"1\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert ask(client, b"a")[::2] == (200, b"POST /full 1")


def test_a_connection_that_is_refused_and_stays_silent_is_closed_like_any_other(server: Served) -> None:
    with server.connect() as client:
        assert ask(client, FULL + CL + b"1\r\n\r\na")[0] == 429
        assert client.recv(4096) == b""  # the keep-alive timer


def test_who_leaves_amid_a_body_that_is_refused_leaves_nothing_behind(server: Served) -> None:
    with server.connect() as client:
        client.sendall(FULL + CL + b"9\r\n\r\nabc")
        assert client.recv(4096).startswith(b"HTTP/1.1 429")


def test_who_never_reads_refusals_is_dropped_before_they_gather(server: Served) -> None:
    with server.connect(receive_buffer=2**12) as client:
        transport = server.narrow()
        client.settimeout(0.05)
        unsent = [0]

        def goes_on() -> bool:
            with contextlib.suppress(TimeoutError, ConnectionError):
                client.send((FULL + CL + b"1\r\n\r\na") * 50)
            unsent.append(transport.get_write_buffer_size())
            return server.idle

        server.until(goes_on)
    assert 0 < max(unsent) < 2**17
