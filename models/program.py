"""A guard as it serves on a CPU: its look and its question as two graphs that run outside the Python interpreter.

Step by step, a forward comes back to the interpreter some two hundred times, and each time waits for the lock that the threads want which read requests.
TorchScript's traces need no compiler on the server, and run the very same steps. A trace follows one path: a network that might take another is found by
torch.fx, which refuses any step that depends on values. Such a guard, and one that its program does not repeat, is served as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.guard import Guard, Judgement, Seen, gated
from models.trunk import trace

TOLERANCE = 1e-5


class Program(nn.Module):
    """Judges like the guard that it was traced from; holds all that it needs of it."""

    def __init__(self, look: nn.Module, ask: nn.Module, gate: float) -> None:
        super().__init__()
        self.look, self.ask, self.gate = look, ask, gate

    @torch.inference_mode()
    def forward(self, pixels: Tensor, ungated: bool = False) -> Judgement:
        """As of `Guard`."""
        return gated(lambda pixels: Seen(*self.look(pixels)), lambda seen: self.ask(*seen), self.gate, pixels, ungated)


class _Step(nn.Module):
    """A method of a guard, of and to plain tensors."""

    def __init__(self, guard: Guard, method: Callable[..., Any]) -> None:
        super().__init__()
        self.guard, self.method = guard, method

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.method(*tensors))


def serving(guard: Guard, images: Tensor) -> nn.Module:
    """What serves instead of a guard, warmed up: its program, or itself, without the suspect as it was: its folded parts are all that runs.

    images: uint8 [N, 3, size, size] on the guard's device; the program has to judge them as the guard does.
    """
    lean = copy.copy(guard)
    lean._modules = {name: module for name, module in guard._modules.items() if module is not guard.suspect}
    found = program(lean, images) if images.device.type == "cpu" else None  # a GPU waits for launches, not for the interpreter
    served = found or lean
    for batch in (images[:1], images):  # the first forwards of a network are slow: not a caller's time
        served(batch, ungated=True)
    return served


def program(guard: Guard, images: Tensor) -> Program | None:
    """None where there is none, or it does not judge the images, uint8 [N, 3, size, size], as the guard does."""
    look, ask = _Step(guard, guard.look), _Step(guard, lambda *seen: guard.ask(Seen(*seen)))
    try:
        for network in (*guard.parts, *guard.experts, guard.auxiliary):
            trace(network)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each size that becomes a constant; whether that is right is tried below
            seen = guard.look(images[:2])
            made = Program(torch.jit.trace(look, images[:2], check_trace=False), torch.jit.trace(ask, tuple(seen), check_trace=False), guard.gate).eval()
            right = all(_alike(made(part, ungated=True), guard(part, ungated=True)) for part in (images, images[:1], images[-3:]))
    except Exception:  # noqa: BLE001 - whatever a foreign network raises here, the guard can still run it
        return None
    return made if right else None


def _alike(one: Judgement, other: Judgement) -> bool:
    return all(torch.allclose(value, getattr(other, name), rtol=TOLERANCE, atol=TOLERANCE) for name, value in vars(one).items())
