"""Rows G1 to G4, G12, P5 and P8 of the abuse catalogue: full queues, deadlines, bytes in memory, the end of the server, and a device that fails."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from torch import Tensor

from service.caller import Caller
from service.engine import Engine, LiveGuard, Outcome
from tests.abuse.calls import GUARD, PREDICT, UPLOAD, row, unread
from tests.support import MULTIPART, Client, assert_problem, form, make_service, part, png, serving


class Gated(Engine):
    """A device that begins each batch when the test lets it, and one batch at a time, however many cores this machine has."""

    def __init__(self, *collaborators: Any) -> None:
        super().__init__(*collaborators)
        self.slots = 1
        self.gate, self.images = threading.Semaphore(0), 0

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        assert self.gate.acquire(timeout=10)
        self.images += len(pixels)
        return super().run(live, pixels)


def admitted(client: Client, count: int) -> list[Any]:
    """Good requests under way: one on the gated device, the others in the queue behind it."""

    async def begin() -> list[Any]:
        tasks = []
        for number in range(count):
            tasks.append(asyncio.create_task(client.call("POST", PREDICT, [("Content-Type", "image/png")], png())))
            async with asyncio.timeout(10):
                while client.service.batcher.busy_since is None or client.service.batcher.waiting < number:
                    await asyncio.sleep(0.001)
        return tasks

    return list(client.runner.run(begin()))


def answered(client: Client, tasks: list[Any]) -> list[int]:
    async def wait() -> list[int]:
        return [(await task).status_code for task in tasks]

    return client.runner.run(wait())


def test_g1_a_full_queue_refuses_at_once_and_who_was_admitted_is_answered(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated, queue_images=2)) as client:
        engine = client.service.engine
        assert isinstance(engine, Gated)
        tasks = admitted(client, 3)
        began = time.perf_counter()
        assert_problem(client.predict(png()), 429, "overloaded")
        assert time.perf_counter() - began < 0.2  # 20 ms, and room for a busy machine
        assert "badexpert_queue_images 2.0" in client("GET", "/metrics").text
        engine.gate.release(10)
        assert answered(client, tasks) == [200, 200, 200]
        client.assert_serves()


def test_g3_a_deadline_that_passes_in_the_queue_is_answered_in_time_and_its_image_never_reaches_the_device(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated)) as client:
        engine = client.service.engine
        assert isinstance(engine, Gated)
        tasks = admitted(client, 1)
        began = time.perf_counter()
        assert_problem(client.predict(png(), "image/png", ("X-Deadline-Ms", "100")), 504, "deadline_exceeded")
        assert 0.09 < time.perf_counter() - began < 0.1 + 0.25 + 0.25  # the promise, and room for a busy machine
        engine.gate.release(10)
        assert answered(client, tasks) == [200]
        assert engine.images == 1
        client.assert_serves()


@pytest.mark.parametrize(
    ("milliseconds", "status", "code"),
    [
        row("G4: 0", "0", 504, "deadline_exceeded"),
        row("G4: -1", "-1", 504, "deadline_exceeded"),
        row("G4: letters", "abc", 422, "deadline_invalid"),
        row("G4: nothing", "", 422, "deadline_invalid"),
        row("G4: a fraction", "1.5", 422, "deadline_invalid"),
        row("G4: two signs", "--1", 422, "deadline_invalid"),
        row("G4: a sign alone", "-", 422, "deadline_invalid"),
        row("G4: a superscript", "\xb2", 422, "deadline_invalid"),
        row("G4: 5,000 digits", "9" * 5000, 422, "deadline_invalid"),
    ],
)
@pytest.mark.parametrize("call", ["predict", "predict-batch"])
def test_a_deadline_is_refused(client: Client, call: str, milliseconds: str, status: int, code: str) -> None:
    headers = [("Content-Type", MULTIPART), ("X-Deadline-Ms", milliseconds)]
    response = client("POST", f"/v1/guards/cifar/{call}", headers, form(part("image", png())))
    if call == "predict-batch" and status == 504:
        assert response.json()["items"][0]["problem"]["code"] == code
    else:
        assert_problem(response, status, code)


def test_g4_a_deadline_beyond_the_servers_own_is_the_servers_own(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated, deadline_seconds=0.1)) as client:
        assert isinstance(client.service.engine, Gated)
        assert_problem(client.predict(png(), "image/png", ("X-Deadline-Ms", "1000000000000")), 504, "deadline_exceeded")
        client.service.engine.gate.release(10)


def test_g12_while_draining_everything_but_health_is_refused_and_what_was_admitted_is_finished(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Gated)) as client:
        assert isinstance(client.service.engine, Gated)
        tasks = admitted(client, 3)

        async def drain() -> None:
            client.service.begin_drain()

        client.runner.run(drain())
        for method, target in (("POST", PREDICT), ("GET", GUARD), ("POST", UPLOAD), ("GET", "/nowhere")):
            response = client(method, target, [("Content-Type", "image/png")], png(), on_receive=unread)
            assert_problem(response, 503, "draining")
            assert response.headers["connection"] == "close"
        assert_problem(client("GET", "/readyz"), 503, "not_ready")
        assert client("GET", "/livez").status_code == 200
        assert "badexpert_ready 0.0" in client("GET", "/metrics").text
        client.service.engine.gate.release(10)
        assert answered(client, tasks) == [200, 200, 200]


SMALL = {"image_bytes": 4096, "batch_images": 3, "body_bytes": 3 * 4096}  # one batch of the largest images
BATCH = "/v1/guards/cifar/predict-batch"
AS_FORM = [("Content-Type", MULTIPART)]


def test_p5_images_that_are_sent_and_judged_take_no_more_memory_than_they_may(tmp_path: Path) -> None:
    image = png().ljust(4096, b"\0")
    with serving(make_service(tmp_path, Gated, **SMALL)) as client:
        assert isinstance(client.service.engine, Gated)

        async def admit() -> list[Any]:
            tasks = [
                asyncio.create_task(client.call("POST", PREDICT, [("Content-Type", "image/png")], image)),
                asyncio.create_task(client.call("POST", BATCH, AS_FORM, form(part("image", image), part("image", image)))),
            ]
            async with asyncio.timeout(10):
                while client.service.images.budget.held < 3 * 4096:
                    await asyncio.sleep(0.001)
            return tasks

        tasks = client.runner.run(admit())
        assert "badexpert_body_bytes 12288.0" in client("GET", "/metrics").text
        assert "badexpert_body_capacity_bytes 12288.0" in client("GET", "/metrics").text
        assert "memory" in assert_problem(client.predict(png()), 429, "overloaded")["detail"]
        assert_problem(client("POST", BATCH, AS_FORM, form(part("image", png()))), 429, "overloaded")
        client.service.engine.gate.release(10)
        assert answered(client, tasks) == [200, 200]
        assert "badexpert_body_bytes 0.0" in client("GET", "/metrics").text
        assert client("POST", BATCH, AS_FORM, form(*[part("image", image)] * 3)).status_code == 200
        client.assert_serves()


def leaving(client: Client, target: str) -> None:
    held = []

    def body() -> Iterator[bytes]:
        yield part("image", png())[:1000]
        held.append(client.service.images.budget.held)
        raise ClientDisconnect

    with suppress(AssertionError):  # of the client: there is no answer, since nobody is there
        client("POST", target, AS_FORM, body())
    assert held[0] > 0


def cancelled(client: Client, target: str) -> None:
    async def run() -> None:
        task = asyncio.create_task(client.call("POST", target, AS_FORM, form(part("image", png()))))
        async with asyncio.timeout(10):
            while client.service.images.budget.held == 0 or client.service.batcher.busy_since is None:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])

    client.runner.run(run())
    client.service.engine.gate.release()  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", [PREDICT, BATCH])
@pytest.mark.parametrize(
    "end",
    [
        pytest.param(leaving, id="its sender leaves"),
        pytest.param(cancelled, id="it is given up"),
        pytest.param(lambda client, target: client("POST", target, AS_FORM, form(part("image", png()), part("x", b"x"))), id="it is refused"),
        pytest.param(lambda client, target: client("POST", target, AS_FORM, form(part("image", png()[:100]))), id="it cannot be decoded"),
        pytest.param(lambda client, target: client("POST", target, [*AS_FORM, ("X-Deadline-Ms", "1")], form(part("image", png()))), id="its time is over"),
        pytest.param(lambda client, target: client("POST", target, AS_FORM, part("image", png())), id="its form does not end"),
    ],
)
def test_p5_the_bytes_of_a_request_are_given_back_however_it_ends(tmp_path: Path, target: str, end: Any) -> None:
    with serving(make_service(tmp_path, Gated, **SMALL)) as client:
        end(client, target)
        assert client.service.images.budget.held == 0
        assert isinstance(client.service.engine, Gated)
        client.service.engine.gate.release(10)
        client.assert_serves()


@pytest.mark.parametrize("target", [PREDICT, BATCH])
def test_g7_what_a_caller_wanted_who_has_left_is_given_up_and_its_bytes_are_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    caller = Caller()
    with serving(make_service(tmp_path, Gated, **SMALL)) as client:
        service = client.service
        assert isinstance(service.engine, Gated)
        tasks = admitted(client, 1)
        monkeypatch.setattr("service.predict.caller_of", lambda _: caller)

        async def leave() -> None:
            held = service.images.budget.held
            task = asyncio.create_task(client.call("POST", target, AS_FORM, form(part("image", png(seed=1)))))
            async with asyncio.timeout(10):
                while service.batcher.waiting < 1:
                    await asyncio.sleep(0.001)
                caller.leave()
                await asyncio.wait([task])
            assert isinstance(task.exception(), AssertionError)  # of the client: nobody was answered
            assert (service.batcher.waiting, service.images.budget.held) == (0, held)

        client.runner.run(leave())
        service.engine.gate.release(10)
        assert answered(client, tasks) == [200]
        assert service.engine.images == 1
        found = client("GET", "/metrics").text
        assert 'badexpert_images_total{outcome="abandoned"} 1.0' in found
        assert 'status="499"} 1.0' in found


class Raising(Engine):
    """A device that fails on every batch with something that nobody foresaw."""

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        raise RuntimeError("CUDA error at /secret/path: out of luck")


def test_p8_a_failing_device_is_a_503_that_tells_nothing_of_its_insides(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Raising)) as client:
        assert "secret" not in json.dumps(assert_problem(client.predict(png()), 503, "device_failed"))


def test_p8_what_nobody_foresaw_is_a_500_in_the_one_shape(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(make_service(tmp_path)) as client:

        def broken(_: str) -> None:
            raise ZeroDivisionError("secret")

        client.service.engine.live = broken  # type: ignore[method-assign,assignment]
        problem = assert_problem(client.predict(png()), 500, "internal")
        assert "secret" not in json.dumps(problem)
        assert problem["request_id"] in "".join(capfd.readouterr())  # the log has it, with the trace
