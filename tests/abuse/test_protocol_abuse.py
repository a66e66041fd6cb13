"""Drives `service.protocol` under a real uvicorn with raw sockets: the rows E1-E10, E17, E19, E21 and E22 of the abuse catalogue, as far as
the protocol class owns them. After every row the server must answer ordinary requests, hold no connection or task, and have logged no
trace."""

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.caller import Caller
from service.protocol import ProtocolLimits, close_waiting
from tests.served import CL, CLOSE, GET, LAST, LIMITS, POST, TE, Answer, Served, answers, ask, talk

CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADE = POST + b"Connection: Upgrade\r\nUpgrade: "
UPLOAD = b"POST /upload HTTP/1.1\r\nHost: a\r\n"
LATE = b"POST /late HTTP/1.1\r\nHost: a\r\n"
Steps = tuple[bytes | float, ...]  # bytes are sent, numbers are seconds to wait
DRIP: Steps = (b"a", 0.05) * 7


@pytest.fixture(scope="module")
def module_server() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def server(module_server: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    caplog.set_level(logging.INFO)
    yield module_server
    module_server.until(lambda: module_server.idle)
    with module_server.connect() as client:
        assert [ask(client, GET)[::2] for _ in range(2)] == [(200, b"GET / 0")] * 2
    module_server.until(lambda: module_server.idle)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []  # nobody may fill a disk


def assert_problem(answer: Answer, status: int, code: str) -> None:
    """The one shape of an error."""
    got, headers, body = answer
    problem = json.loads(body)
    assert (got, problem["code"], problem["status"]) == (status, code, status)
    assert list(problem) == ["type", "title", "status", "code", "detail", "request_id"]
    assert headers["content-type"] == "application/problem+json"
    assert (headers["connection"], headers["x-content-type-options"]) == ("close", "nosniff")
    assert headers["x-request-id"] == problem["request_id"] and re.fullmatch("[0-9a-f]{32}", problem["request_id"])


def assert_garbage(answer: Answer) -> None:
    assert (answer[0], answer[2], answer[1]["connection"]) == (400, b"Invalid HTTP request received.", "close")
    assert answer[1]["x-content-type-options"] == "nosniff"


def case(row: str, *steps: bytes | float) -> Any:
    return pytest.param(steps, id=row)


def problem_case(row: str, status: int, code: str, *steps: bytes | float) -> Any:
    return pytest.param(status, code, steps, id=row)


LINES = b"X: a\r\n" * 10_000


@pytest.mark.parametrize(
    "steps",
    [
        case("E1 binary garbage is refused", bytes(range(256)) * 4),
        case("E1 HTTP/0.9 is refused", b"GET /\r\n\r\n"),
        case("E1 HTTP/2.0 in words is refused", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
        case("E1 HTTP/3.0 is refused", b"GET / HTTP/3.0\r\nHost: a\r\n\r\n"),
        case("E1 a TLS hello on the plain port is refused", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 32),
        case("E5 a negative Content-Length is refused", POST + CL + b"-1\r\n\r\n"),
        case("E5 a Content-Length in letters is refused", POST + CL + b"abc\r\n\r\n"),
        case("E5 an empty Content-Length is refused", POST + CL + b"\r\n\r\n"),
        case("E5 two different Content-Lengths are refused", POST + CL + b"1\r\n" + CL + b"2\r\n\r\nab"),
        case("E5 two equal Content-Lengths are refused", POST + CL + b"1\r\n" + CL + b"1\r\n\r\na"),
        case("E5 a list of Content-Lengths is refused", POST + CL + b"1, 1\r\n\r\na"),
        case("E5 a Content-Length with a sign is refused", POST + CL + b"+5\r\n\r\nabcde"),
        case("E5 a Content-Length of 20 digits is refused", POST + CL + b"99999999999999999999\r\n\r\n"),
        case("E6 Content-Length before Transfer-Encoding is refused", POST + CL + b"5\r\n" + TE + b"chunked\r\n\r\n" + LAST),
        case("E6 Transfer-Encoding before Content-Length is refused", POST + TE + b"chunked\r\n" + CL + b"5\r\n\r\n" + LAST),
        case("E6 chunked then identity is refused", POST + TE + b"chunked, identity\r\n\r\n" + LAST),
        case("E6 identity then chunked on two lines is refused", POST + TE + b"identity\r\n" + TE + b"chunked\r\n\r\n" + LAST),
        case("E6 Transfer-Encoding gzip is refused", POST + TE + b"gzip\r\n\r\n"),
        case("E6 Transfer-Encoding gzip, chunked is refused", POST + TE + b"gzip, chunked\r\n\r\n" + LAST),
        case("E6 Transfer-Encoding in HTTP/1.0 is refused", b"POST / HTTP/1.0\r\nHost: a\r\n" + TE + b"chunked\r\n\r\n" + LAST),
        case("E6 a space before the colon is refused", POST + b"Content-Length : 5\r\n\r\nabcde"),
        case("E6 a folded header is refused", POST + b"X: a\r\n b\r\n\r\n"),
        case("E6 a NUL in a value is refused", POST + b"X: a\x00b\r\n\r\n"),
        case("E6 lines that end in a bare LF are refused", b"GET / HTTP/1.1\nHost: a\n\n"),
        case("E6 a bare CR in a value is refused", POST + b"X: a\rHost: b\r\n\r\n"),
        case("E17 an escape sequence in X-Request-Id is refused", b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: \x1b[31m\r\n\r\n"),
    ],
)  # fmt: skip
def test_garbage_gets_400_before_the_application_runs(server: Served, steps: Steps) -> None:
    calls, server.refused = server.calls, []
    with server.connect() as client:
        (refusal,) = answers(talk(client, *steps))
    assert_garbage(refusal)
    assert (server.calls, server.refused) == (calls, [400])


@pytest.mark.parametrize(
    ("status", "code", "steps"),
    [
        problem_case("E2 a request without Host is refused", 400, "host_header", b"GET / HTTP/1.1\r\n\r\n"),
        problem_case("E2 two Hosts are refused", 400, "host_header", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
        problem_case("E2 a Host that is no host is refused", 400, "host_header", b"GET / HTTP/1.1\r\nHost: a, b/@c\r\n\r\n"),
        problem_case("E2 two Hosts are refused in HTTP/1.0 too", 400, "host_header", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
        problem_case("E3 a header of 33 KiB is refused", 431, "headers_too_large", POST + b"X: " + b"a" * 33 * 1024 + b"\r\n\r\n"),
        problem_case("E3 33 KiB over many lines are refused", 431, "headers_too_large", POST + (b"X: " + b"a" * 1024 + b"\r\n") * 33),
        problem_case("E3 a header of 100 KB is refused while it streams", 431, "headers_too_large", POST + b"X: " + b"a" * 100_000),
        problem_case("E3 a header name of 100 KB is refused", 431, "headers_too_large", POST + b"a" * 100_000),
        problem_case("E3 101 header lines are refused", 431, "headers_too_large", GET[:-2] + LINES[: 100 * 6] + b"\r\n"),
        problem_case("E3 10,000 header lines are refused", 431, "headers_too_large", b"GET / HTTP/1.1\r\n" + LINES),
        problem_case("E4 a URI one byte over 8 KiB is refused", 414, "uri_too_long", b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\n"),
        problem_case("E4 a URI of 100 KB is refused while it streams", 414, "uri_too_long", b"GET /" + b"a" * 100_000),
        problem_case("E13 CONNECT is refused", 405, "method_not_allowed", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
        problem_case("E19 a WebSocket is refused", 400, "upgrade_refused", UPGRADE + b"websocket\r\n\r\n"),
        problem_case("E19 an h2c upgrade is refused", 400, "upgrade_refused", UPGRADE + b"h2c\r\n" + CL + b"27\r\n\r\n", 0.05, GET),
        problem_case("E21 a silent connection is closed at the deadline", 408, "receive_timeout"),
        problem_case("E21 blank lines without end are no message", 408, "receive_timeout", *(b"\r\n", 0.1) * 4),
        problem_case("E21 half a header is cut at the deadline", 408, "receive_timeout", b"GET / HTTP/1.1\r\nHo"),
        problem_case("E21 a header that drips is cut at the deadline", 408, "receive_timeout", b"GET / HTTP/1.1\r\n", *(b"X", 0.05) * 7),
        problem_case("E21 a stalled body is cut at the deadline", 408, "receive_timeout", POST + CL + b"10\r\n\r\nabc"),
        problem_case("E21 a body that drips is cut at the deadline", 408, "receive_timeout", POST + CL + b"99\r\n\r\n", *DRIP),
        problem_case("E21 a stalled upload is cut", 408, "receive_timeout", UPLOAD + CL + b"10\r\n\r\na"),
        problem_case("E21 an upload that drips is cut", 408, "receive_timeout", UPLOAD + CL + b"99\r\n\r\n", *DRIP),
    ],
)  # fmt: skip
def test_refusals_have_the_one_shape(server: Served, status: int, code: str, steps: Steps) -> None:
    calls, server.refused = server.calls, []
    with server.connect() as client:
        (refusal,) = answers(talk(client, *steps))
    assert_problem(refusal, status, code)
    assert server.refused == [status]
    assert server.calls <= calls + (code == "receive_timeout")  # a body that stalls has had its head


@pytest.mark.parametrize(
    "steps",
    [
        case("E2 HTTP/1.0 may leave Host out", b"GET / HTTP/1.0\r\n\r\n"),
        case("E2 an IPv6 Host with a port is a Host", b"GET / HTTP/1.1\r\nHost: [::1]:8000\r\n" + CLOSE),
        case("E3 100 header lines and 30 KiB are taken", GET[:-2] + LINES[: 97 * 6] + b"X: " + b"a" * 30_000 + b"\r\n" + CLOSE),
        case("E4 a URI of 8 KiB is taken", b"GET /" + b"a" * 8191 + b" HTTP/1.1\r\nHost: a\r\n" + CLOSE),
        case("E7 trailers are dropped", CHUNKED.replace(b"POST", b"PUT") + b"1\r\na\r\n0\r\nHost: b\r\nX: c\r\n\r\n" + GET[:-2] + CLOSE),
        case("E21 an upload that makes progress outlives the deadline", UPLOAD + CL + b"327680\r\n" + CLOSE, *(b"a" * 2**16, 0.1) * 5),
        case("E21 a pause of ours is not held against a body", LATE + CL + b"8388608\r\n" + CLOSE + b"a" * 2**23),
        case("E21 a slow request is not cut after its body", LATE + CL + b"1\r\n" + CLOSE + b"a"),
    ],
)  # fmt: skip
def test_what_is_odd_but_right_is_served(server: Served, steps: Steps) -> None:
    with server.connect() as client:
        assert {status for status, _, _ in answers(talk(client, *steps))} == {200}


def test_e3_a_header_of_100_mb_never_gathers_in_memory(server: Served) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    megabyte, before, peak = b"a" * 2**20, resident(), 0
    tracemalloc.start()
    with server.connect() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(POST + b"X: ")
            for _ in range(100):
                client.sendall(megabyte)
                peak = max(peak, resident())
        (refusal,) = answers(talk(client))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert peak - before < 2**23  # the allocator's own noise is up to 3 MB
    assert_problem(refusal, 431, "headers_too_large")


@pytest.mark.parametrize(
    "steps",
    [
        case("E7 a chunk size in letters is refused", CHUNKED, b"ZZ\r\n"),
        case("E7 a chunk size beyond 64 bits is refused", CHUNKED, b"f" * 17 + b"\r\n"),
        case("E7 a chunk extension of 1 MB is refused", CHUNKED + b"1;" + b"a" * 2**20),
        case("E7 trailers of 1 MB are refused", CHUNKED + b"0\r\nX: " + b"a" * 2**20),
        case("E7 200,000 trailers are refused", CHUNKED + b"0\r\n" + b"X: a\r\n" * 200_000),
    ],
)
def test_bad_chunks_get_400(server: Served, steps: Steps) -> None:
    with server.connect() as client:
        (refusal,) = answers(talk(client, *steps))
    assert_garbage(refusal)


def test_e7_200_000_chunks_of_one_byte_do_not_hold_up_the_loop(server: Served) -> None:
    async def longest_turn() -> float:
        turns = [0.0]
        while not done.is_set():
            begin = time.thread_time()  # the loop's own time: a busy machine is not its fault
            await asyncio.sleep(0.001)
            turns.append(time.thread_time() - begin)
        return max(turns)

    done = threading.Event()
    turn = asyncio.run_coroutine_threadsafe(longest_turn(), server.loop)
    with server.connect() as client:
        answer = ask(client, CHUNKED.replace(b"POST /", b"POST /upload") + b"1\r\na\r\n" * 200_000 + b"0\r\n\r\n")
    done.set()
    assert answer[::2] == (200, b"POST /upload 200000")
    assert turn.result(5) < 0.1


def test_e8_100_pipelined_requests_are_answered_in_order(server: Served) -> None:
    with server.connect() as client:
        found = answers(talk(client, *(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % i for i in range(99)), GET[:-2] + CLOSE))
    assert [body for _, _, body in found] == [b"GET /%d 0" % i for i in range(99)] + [b"GET / 0"]


def test_e8_a_pipeline_too_deep_is_answered_as_far_as_it_was_taken(server: Served) -> None:
    with server.connect() as client:
        *taken, refusal = answers(talk(client, GET * 10_000))
    assert {answer[::2] for answer in taken} == {(200, b"GET / 0")} and len(taken) >= LIMITS.pipelined
    assert_problem(refusal, 400, "pipeline_too_deep")


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        pytest.param(b"POST /late", b"\x00\x01", None, id="E8 garbage behind a slow request waits for its answer"),
        pytest.param(b"POST /late", GET[:-2], "receive_timeout", id="E8 half a head behind a slow one waits for its answer"),
        pytest.param(b"POST /late", POST + CL + b"9\r\n\r\na", "receive_timeout", id="E8 half a body behind a slow one is cut in its turn"),
        pytest.param(b"POST /late", CHUNKED + b"ZZ", None, id="E8 a bad chunk behind a slow request is not run"),
        pytest.param(b"POST /", b"0\r\n\r\nGET / HTTP/1.1\r\n" * 2, None, id="E8 a smuggled tail is judged alone"),
    ],
)  # fmt: skip
def test_what_follows_a_good_request_is_judged_alone(server: Served, first: bytes, second: bytes, code: str | None) -> None:
    calls = server.calls
    with server.connect() as client:
        good, refusal = answers(talk(client, first + b" HTTP/1.1\r\nHost: a\r\n" + CL + b"2\r\n\r\nab" + second))
    assert good[::2] == (200, first + b" 2")
    assert server.calls <= calls + 1 + (code == "receive_timeout")  # half a body has a whole head
    assert_problem(refusal, 408, code) if code else assert_garbage(refusal)


def test_e8_a_second_request_after_an_error_is_not_run(server: Served) -> None:
    calls = server.calls
    with server.connect() as client:
        (refusal,) = answers(talk(client, b"GET / HTTP/1.1\r\n\r\n" + GET, 0.05, GET))
    assert_problem(refusal, 400, "host_header")
    assert server.calls == calls


def test_e8_a_departed_client_releases_the_running_and_the_queued_requests(server: Served) -> None:
    with server.connect() as client:
        client.sendall(GET.replace(b"/ ", b"/hang ") + GET * 3)
        server.until(lambda: server.uvicorn.server_state.tasks)


def test_e8_keep_alive_serves_head_and_bodies_one_after_another(server: Served) -> None:
    with server.connect() as client:
        client.sendall(GET.replace(b"GET", b"HEAD"))
        assert client.recv(4096).endswith(b"content-length: 8\r\n\r\n")
        for _ in range(6):  # together longer than one deadline
            time.sleep(0.06)
            assert ask(client, POST + CL + b"3\r\n\r\nabc")[::2] == (200, b"POST / 3")


def test_e9_a_body_of_10_gb_is_refused_before_it_is_asked_for(server: Served) -> None:
    with server.connect() as client:
        ((status, headers, _),) = answers(talk(client, POST + b"Expect: 100-continue\r\n" + CL + b"10000000000\r\n\r\n"))
    assert (status, headers["connection"]) == (413, "close")


def test_e9_waiting_for_100_continue_is_not_held_against_the_client(server: Served) -> None:
    with server.connect() as client:
        client.sendall(LATE + b"Expect: 100-continue\r\n" + CL + b"3\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert ask(client, b"abc")[::2] == (200, b"POST /late 3")


def test_e10_a_body_shorter_than_announced_closes_the_connection(server: Served) -> None:
    with server.connect() as client:
        client.sendall(POST + CL + b"10\r\n\r\nabc")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(4096) == b""


def test_e17_a_refusal_never_echoes_the_request_id(server: Served) -> None:
    with server.connect() as client:
        raw = talk(client, b"GET / HTTP/1.1\r\nX-Request-Id: " + b"evil" * 256 + b"\r\n\r\n")
    assert_problem(answers(raw)[0], 400, "host_header")
    assert b"evil" not in raw


def test_e19_h2c_with_prior_knowledge_is_refused(server: Served) -> None:
    with server.connect() as client:
        (refusal,) = answers(talk(client, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)))
    assert_garbage(refusal)


def test_e21_a_body_that_goes_on_after_the_answer_is_drained_but_not_for_ever(server: Served) -> None:
    with server.connect() as client:
        assert ask(client, POST + CL + b"2000000000\r\n\r\nabc")[0] == 413
        assert talk(client, *DRIP) == b""


def test_e21_a_body_that_ends_after_its_answer_leaves_the_connection_in_order(server: Served) -> None:
    early = b"POST /early HTTP/1.1\r\nHost: a\r\n" + CL + b"6\r\n\r\nabc"
    with server.connect() as client:
        assert ask(client, early)[::2] == (200, b"POST /early 0")
        assert ask(client, b"def" + GET)[::2] == (200, b"GET / 0")
        assert ask(client, early)[::2] == (200, b"POST /early 0")
        assert talk(client, b"def") == b""  # the keep-alive timer closes it


def test_e21_blank_lines_do_not_keep_a_used_connection_open(server: Served) -> None:
    with server.connect() as client:
        assert ask(client, GET)[0] == 200
        (refusal,) = answers(talk(client, *(b"\r\n", 0.1) * 4))
    assert_problem(refusal, 408, "receive_timeout")


def test_e21_half_a_header_and_a_stalled_body_do_not_hold_up_the_end() -> None:
    served = Served(LIMITS)
    with served.connect() as half, served.connect() as stalled:
        half.sendall(b"GET / HT")
        stalled.sendall(POST + CL + b"10\r\n\r\nabc")
        served.until(lambda: served.uvicorn.server_state.tasks)
        assert served.stop() < 2


@pytest.mark.parametrize(
    "request_line",
    [
        pytest.param(b"GET /flood HTTP/1.1", id="E22 an endless answer that is never read is dropped"),
        pytest.param(b"GET /big HTTP/1.1", id="E22 a large answer that is never read is dropped"),
        pytest.param(b"GET /big HTTP/1.0", id="E22 a large answer that is never read is dropped while closing"),
        pytest.param(b"GET /fits HTTP/1.0", id="E22 a small answer that is never read is dropped while closing"),
    ],
)
def test_a_client_that_never_reads_is_dropped(server: Served, request_line: bytes) -> None:
    with server.connect(receive_buffer=2**12) as client:
        transport = server.narrow()
        client.sendall(request_line + b"\r\nHost: a\r\n\r\n")
        unsent = [0]
        server.until(lambda: unsent.append(transport.get_write_buffer_size()) or server.idle)  # type: ignore[func-returns-value]
    assert 0 < max(unsent) <= 2**24 + 2**10
    assert max(unsent) <= 2**18 + 2**10 or b"/big" in request_line


def test_the_application_can_tell_that_its_caller_has_left_before_it_answers(server: Served) -> None:
    callers = list[Caller]()
    with server.connect() as stays, server.connect() as leaves:
        for client in (stays, leaves):
            before = len(server.callers)
            client.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
            server.until(lambda before=before: len(server.callers) > before)  # type: ignore[misc]
            callers.append(server.callers[-1])
        leaves.close()
        server.until(lambda: callers[1].left)
        assert not callers[0].left


def test_e22_a_client_that_reads_slowly_gets_the_whole_answer(server: Served) -> None:
    with server.connect(receive_buffer=2**18) as client:
        client.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        time.sleep(0.1)
        raw, begin = bytearray(), time.monotonic()
        while piece := client.recv(2**18):
            raw += piece
            time.sleep(0.02)
    assert len(answers(bytes(raw))[0][2]) == 2**24
    assert time.monotonic() - begin > LIMITS.write_seconds


def test_g5_of_those_that_wait_for_a_message_the_half_that_has_waited_longest_is_closed() -> None:
    served = Served(ProtocolLimits(receive_seconds=60))
    with served.connect() as silent, served.connect() as half, served.connect() as running, served.connect() as first, served.connect() as second:
        half.sendall(b"GET / HT")
        running.sendall(GET.replace(b"/ ", b"/hang "))
        for client in (first, second):  # which uvicorn closes after a second of silence, so before the one that never spoke
            assert ask(client, GET)[0] == 200
        connections = served.uvicorn.server_state.connections
        served.until(lambda: len(connections) == 5 and len([c for c in connections if c.waits_until is None]) == 2)  # type: ignore[union-attr]
        served.loop.call_soon_threadsafe(close_waiting, connections)
        assert (first.recv(1), second.recv(1)) == (b"", b"")
        for client in (silent, half):
            client.sendall(GET if client is silent else b"TP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert served.uvicorn.server_state.tasks
    served.stop()
