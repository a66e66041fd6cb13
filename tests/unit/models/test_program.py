"""What serves instead of a guard says what the guard says, and holds no network twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.guard import Guard
from models.preprocessing import Preprocessing
from models.program import Program, program, serving
from tests.untrained import PIXELS, TOLERANCE, untrained_guard


@pytest.fixture(scope="module")
def guard() -> Guard:
    return untrained_guard()


@pytest.mark.parametrize("batch", [1, 7, 96])
def test_a_program_judges_as_its_guard_whatever_reaches_the_gate(guard: Guard, batch: int) -> None:
    found = serving(copy.deepcopy(guard), PIXELS[:8])
    assert isinstance(found, Program)
    for part in PIXELS.split(batch):
        for ungated in (False, True):
            mine, its = found(part, ungated), guard(part, ungated)
            for name, value in vars(its).items():
                torch.testing.assert_close(getattr(mine, name), value, **TOLERANCE, equal_nan=True)
            assert torch.equal(mine.prediction, its.prediction)


def test_the_suspect_as_it_was_is_not_kept_beside_its_folded_parts(guard: Guard) -> None:
    mine = copy.deepcopy(guard)
    suspect = sum(value.numel() * value.element_size() for value in mine.suspect.state_dict().values())
    auxiliary = sum(value.numel() * value.element_size() for value in mine.auxiliary.state_dict().values())
    rest = [*mine.experts.state_dict().values(), *mine.distances.state_dict().values()]
    kept = {value.data_ptr(): value.numel() * value.element_size() for value in serving(mine, PIXELS[:8]).state_dict(keep_vars=True).values()}
    assert sum(kept.values()) <= suspect + auxiliary + sum(value.numel() * value.element_size() for value in rest)


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
    assert program(plain, PIXELS[:8]) is None  # though on these images it would agree
    served = serving(plain, PIXELS[:8])
    assert torch.equal(served(PIXELS).score, plain(PIXELS).score)
