"""What serves instead of a guard says what the guard says, and holds no network twice."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models import program
from models.guard import Guard
from models.parallel import computing_with
from models.preprocessing import Preprocessing
from models.program import OnnxFlow, Program, fastest, programs, serving, without
from tests.untrained import PIXELS, TOLERANCE, untrained_guard, untrained_published_guard


@pytest.fixture(scope="module")
def guard() -> Guard:
    return untrained_guard()


@pytest.fixture(scope="module")
def made(guard: Guard) -> dict[bool, Program]:
    """Both programs of the guard: the traced one, and that with ONNX Runtime."""
    mine = copy.deepcopy(guard)
    return {isinstance(each.flow, OnnxFlow): each for each in programs(without(mine, mine.suspect), PIXELS[:8])}


@pytest.mark.parametrize("onnx", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 96])
def test_a_program_judges_as_its_guard_whatever_reaches_the_gate(guard: Guard, made: dict[bool, Program], batch: int, onnx: bool) -> None:
    found = made[onnx]
    for part in PIXELS.split(batch):
        for ungated in (False, True):
            mine, its = found(part, ungated), guard(part, ungated)
            for name, value in vars(its).items():
                torch.testing.assert_close(getattr(mine, name), value, **TOLERANCE, equal_nan=True)
            assert torch.equal(mine.prediction, its.prediction)


@pytest.mark.parametrize("threshold", [-1.0, 0.5])
def test_a_program_of_the_published_score_leaves_out_the_same_experts(threshold: float) -> None:
    published = untrained_published_guard()
    found = programs(without(published, published.suspect), PIXELS[:8])
    assert len(found) == 2
    its = published(PIXELS, threshold=threshold)
    for each in found:
        mine = each(PIXELS, threshold=threshold)
        for name, value in vars(its).items():
            torch.testing.assert_close(getattr(mine, name), value, **TOLERANCE, equal_nan=True)


def size(network: nn.Module) -> int:
    return sum({value.data_ptr(): value.numel() * value.element_size() for value in network.state_dict(keep_vars=True).values()}.values())


def test_no_network_is_held_twice(guard: Guard, made: dict[bool, Program]) -> None:
    most = size(guard.suspect) + size(guard.auxiliary) + size(guard.experts) + size(guard.distances)
    assert size(made[False]) <= most
    flow = made[True].flow
    assert isinstance(flow, OnnxFlow)
    assert size(made[True]) + flow.nbytes <= most
    assert size(serving(copy.deepcopy(guard), PIXELS[:8])) <= most


def test_a_program_that_is_gone_leaves_nothing_behind(guard: Guard) -> None:
    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(2):
        programs(guard, PIXELS[:8])
    before, times = objects(), 4
    for _ in range(times):
        programs(guard, PIXELS[:8])
    assert objects() < before + 100 * times  # TorchScript would keep a class for each module that it traces, some 3,000 objects each time; others come and go


def test_a_program_that_decides_otherwise_does_not_serve(guard: Guard) -> None:
    assert isinstance(serving(copy.deepcopy(guard), PIXELS[:8]), Program)
    assert isinstance(serving(copy.deepcopy(guard), PIXELS[:8], faithful=lambda _: False), Guard)


class Choosing(nn.Module):
    """What it computes depends on what it sees: a trace would have only one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.linear(x.mean((2, 3)))
        return -pooled if x.mean() > 3 else pooled


def test_a_network_that_chooses_its_steps_is_not_made_a_program_of() -> None:
    torch.manual_seed(0)
    plain = Guard(Choosing(), [Choosing()], Choosing(), Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    assert programs(plain, PIXELS[:8]) == []  # though on these images it would agree
    served = serving(plain, PIXELS[:8])
    assert torch.equal(served(PIXELS).score, plain(PIXELS).score)


class Late(nn.Module):
    """Takes so many seconds in each of its turns, and the last of them in all that follow."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.seconds = list(seconds)

    def look(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
        return images


def test_what_is_fast_is_taken_although_something_else_held_it_up_most_of_the_time() -> None:
    fast, slow = Late(0.1, 0.1, 0.1, 0.1, 0.0), Late(0.03)
    assert fastest([slow, fast], PIXELS[:1]) is fast


class Sized(nn.Module):
    """Takes so many seconds by how many images there are."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.seconds = seconds

    def look(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds[len(images)])
        return images


def test_what_is_a_little_slower_at_one_batch_and_much_faster_at_others_is_taken() -> None:
    even, steep = Sized({1: 0.002, 8: 0.012, 32: 0.02}), Sized({1: 0.01, 8: 0.01, 32: 0.04})
    assert fastest([steep, even], PIXELS[:8]) is even


def test_programs_are_compared_with_as_many_threads_as_will_serve(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(candidates: Sequence[nn.Module], images: Tensor) -> nn.Module:
        seen.append(torch.get_num_threads())
        return candidates[0]

    monkeypatch.setattr(program, "fastest", look)
    with computing_with(3):  # as many as a thread finds that loads a bundle
        serving(copy.deepcopy(guard), PIXELS[:8], threads=2)
        assert torch.get_num_threads() == 3
    assert seen == [2]
