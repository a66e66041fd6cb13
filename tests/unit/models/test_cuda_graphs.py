"""Batches are answered by what was recorded of other sizes, row by row. Where there is no GPU a stand-in records, which computes where a graph would replay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.cuda_graphs import STREAMS, Recorded, Recorder, Recording, sizes
from models.guard import Guard, Seen
from models.program import Program, recorded, serving, without
from tests.untrained import PIXELS, untrained_guard, untrained_published_guard

MOST = 24


class StandIn(Recorder):
    """As a graph does, it reads and writes where it did when it was recorded; and what it used meanwhile is anyone's, as in memory that graphs share."""

    def __init__(self) -> None:
        self.replaying = threading.Lock()
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self._all: list[Recording] = []

    def record(self, function: nn.Module, inputs: list[Tensor]) -> Recording:
        rows, outputs = len(inputs[0]), [each.clone() for each in function(inputs)]
        self.recorded.append(rows)

        def replay() -> None:
            self.replayed.append(rows)
            for recording in self._all:
                for output in recording.outputs:
                    output.fill_(77)
            for output, value in zip(outputs, function(inputs), strict=True):
                output.copy_(value)

        self._all.append(Recording(replay, outputs))
        return self._all[-1]


@pytest.mark.parametrize("most", [1, 2, 5, 7, 8, 11, 64, 100, 4096])
def test_at_least_two_thirds_of_a_recorded_batch_are_asked_for(most: int) -> None:
    found = sizes(most)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, most)
    assert all(rows / min(size for size in found if size >= rows) >= 2 / 3 for rows in range(1, most + 1))
    assert len(found) <= 2 * most.bit_length()


@pytest.fixture(params=[untrained_guard, untrained_published_guard], scope="module")
def guard(request: pytest.FixtureRequest) -> Guard:
    made: Guard = request.param()
    return without(made, made.suspect)


def program(guard: Guard, recorder: Recorder) -> Program:
    with torch.no_grad():
        return recorded(guard, PIXELS[:2], MOST, recorder)


def alike(program: Callable[..., Any], guard: Guard, pixels: Tensor, rtol: float = 1e-5, atol: float = 1e-5, **options: Any) -> None:
    mine, its = program(pixels, **options), guard(pixels, **options)
    for name, value in vars(its).items():
        torch.testing.assert_close(getattr(mine, name), value, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"ungated": True}, {"threshold": -1.0}])
def test_batches_of_any_size_are_judged_as_the_guard_judges_them(guard: Guard, options: dict[str, Any]) -> None:
    found = program(guard, StandIn())
    for batch in (5, 1, MOST, 2, MOST + 7, 13):  # a smaller one behind a larger one finds its rows there
        for part in PIXELS.split(batch)[:2]:
            alike(found, guard, part, **options)


def test_the_next_larger_size_answers_and_beyond_the_largest_the_function_itself(guard: Guard) -> None:
    recorder = StandIn()
    found = program(guard, recorder)
    assert recorder.recorded == 2 * list(reversed(sizes(MOST)))
    found.look(PIXELS[:13])
    assert recorder.replayed == [16]
    found.look(PIXELS[: MOST + 1])
    assert recorder.replayed == [16]


def test_an_answer_is_its_askers_own(guard: Guard) -> None:
    found = program(guard, StandIn())
    first = found(PIXELS[:4], ungated=True)
    kept = {name: value.clone() for name, value in vars(first).items()}
    found(PIXELS[50:54], ungated=True)
    assert all(torch.equal(getattr(first, name), value) for name, value in kept.items())


def test_threads_get_the_answers_to_their_own_questions() -> None:
    class Slow(nn.Module):
        def forward(self, values: list[Tensor]) -> list[Tensor]:
            threading.Event().wait(0.001)  # another thread's turn
            return [values[0] + 1]

    made = Recorded(Slow(), [torch.zeros(1, 3)], 4, StandIn())

    def ask(number: int) -> bool:
        asked = torch.full((1 + number % 4, 3), float(number))
        return torch.equal(made([asked])[0], asked + 1)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(200)))


class NoGraph(TorchDispatchMode):
    """Notes what a graph cannot hold: numbers that are brought to the device, values that are looked at, sizes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_is_recorded_does_nothing_that_a_graph_cannot(guard: Guard) -> None:
    with torch.no_grad():
        seen = guard.look(PIXELS[:8])
        guard.ask(seen)
        with NoGraph() as mode:
            guard.ask(Seen(*guard.look(PIXELS[:8])))
            assert mode.found == []
            torch.tensor([1.0]).item()
    assert mode.found == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]  # it does see them


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other shapes may be convolved in another way; in full precision that makes no difference to speak of."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("make", [untrained_guard, untrained_published_guard])
def test_a_gpu_serves_graphs_that_judge_as_the_guard(make: Callable[[], Guard]) -> None:
    pixels, mine = PIXELS.cuda(), make().cuda()
    served = serving(mine, pixels[:8], most=MOST)
    assert any(isinstance(module, Recorded) for module in served.modules())
    for batch in (16, 13):
        for part in pixels.split(batch):
            alike(served, mine, part, rtol=1e-3, atol=1e-3)
            alike(served, mine, part, rtol=1e-3, atol=1e-3, ungated=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_recorder_has_a_stream_of_its_own_until_it_is_gone() -> None:
    device = torch.device("cuda")
    living = [Recorder(device) for _ in range(STREAMS)]
    with pytest.raises(RuntimeError, match="stream"):
        Recorder(device)
    living.pop()
    Recorder(device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_recorded_raises_and_leaves_the_gpu_usable() -> None:
    class Looking(nn.Module):
        def forward(self, values: list[Tensor]) -> list[Tensor]:
            return [values[0] + float(values[0].sum())]

    zeros = torch.zeros(1, 3, device="cuda")
    with pytest.raises(RuntimeError):
        Recorded(Looking(), [zeros], 4, Recorder(zeros.device))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.ones(2, device="cuda").sum().item() == 2
