"""A guard as it serves: graphs that run outside the Python interpreter.

Step by step, a forward comes back to the interpreter some two hundred times, and each time waits for the lock that the threads want which read requests.
So on a CPU it is traced by TorchScript, which runs the very same steps and needs no compiler on the server. Most of the time goes into the suspect's own
convolutions, and those ONNX Runtime may do faster: both are tried, and what is faster here serves. On a GPU it is recorded as CUDA graphs.

A trace follows one path: a network that might take another is found by torch.fx, which refuses any step that depends on values. Such a guard, and one that
no program repeats, is served as it is.
"""

from __future__ import annotations

import copy
import io
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.cuda_graphs import Recorded, Recorder, sizes
from models.guard import Gated, Guard, Judgement, Order, Seen
from models.parallel import computing_with
from models.trunk import CannotCut, trace

TOLERANCE = 1e-5
BATCHES = (1, 8, 32)  # at which programs are compared: which of them is faster is not the same at each
ROUNDS, SECONDS = 7, 0.5  # that this takes at each, at least
_TRACING = threading.Lock()


class Program(nn.Module):
    """Judges like the guard that it was made of; holds all that it needs of it."""

    def __init__(self, flow: nn.Module, gated: nn.Module, order: Order) -> None:
        """flow: from pixels to what the gated look takes beside them."""
        super().__init__()
        self.flow, self.gated, self.order = flow, gated, order

    @torch.inference_mode()
    def forward(self, pixels: Tensor, ungated: bool = False, threshold: float = math.inf) -> Judgement:
        """As of `Guard`."""
        return Judgement(*self.gated([pixels, *self.flow(pixels)], self.order.at(threshold), ungated))

    def look(self, pixels: Tensor) -> Any:
        """As of `Guard`."""
        return cast(Any, self.gated).look([pixels, *self.flow(pixels)])


class NoFlow(nn.Module):
    """Where the look is from pixels alone."""

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return []


class OnnxFlow(nn.Module):
    """What a step gives for pixels, in ONNX Runtime."""

    def __init__(self, step: OfLists, pixels: Tensor, threads: int, weights: nn.Module) -> None:
        """pixels: uint8 [N, 3, size, size], an example; weights: of which module those are that the step uses."""
        super().__init__()
        import onnxruntime  # here: it takes a tenth of a second, and a server on a GPU has no use for it

        outputs = [f"value{number}" for number, _ in enumerate(step([pixels]))]
        axes = {name: {0: "images"} for name in ["pixels", *outputs]}
        graph = io.BytesIO()
        torch.onnx.export(step, ([pixels],), cast(Any, graph), dynamo=False, input_names=["pixels"], output_names=outputs, dynamic_axes=axes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a server that is asked nothing does nothing
        self.session = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])
        self.nbytes = sum(value.numel() * value.element_size() for value in weights.state_dict().values())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """pixels: uint8 [N, 3, size, size]."""
        return [torch.from_numpy(value) for value in self.session.run(None, {"pixels": pixels.numpy()})]


class OfLists(nn.Module):
    """What a method of a module gives for plain tensors, all in one list, as tracers and recorders want it."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method
        self.eval()  # the exporter gives a module back in the mode in which it came, and all below it

    def forward(self, values: list[Tensor]) -> list[Tensor]:
        return list(self.method(*values))


def serving(guard: Guard, images: Tensor, threads: int = 1, most: int = 64, faithful: Callable[[nn.Module], bool] = lambda _: True) -> nn.Module:
    """What serves instead of a guard, warmed up: a program of it, or itself, without the suspect as it was: its folded parts are all that runs.

    images: uint8 [N, 3, size, size] on the guard's device; a program has to judge them as the guard does. threads: of a forward on a CPU. most: images of
    the largest usual batch on a GPU. faithful: what else a program has to be.
    """
    lean = without(guard, guard.suspect)
    with computing_with(threads):  # as it will serve: what is faster with one thread need not be with two
        candidates: list[nn.Module] = [each for each in programs(lean, images, threads, most) if faithful(each)] or [lean]
        for served in candidates:
            for batch in (images[:1], images):  # the first forwards of a network are slow: not a caller's time
                served(batch, ungated=True)
        return fastest(candidates, images) if len(candidates) > 1 else candidates[0]


def programs(guard: Guard, images: Tensor, threads: int = 1, most: int = 64) -> list[Program]:
    """Those that there are, and that judge the images, uint8 [N, 3, size, size], as the guard does."""
    try:
        for network in (*guard.parts, *guard.experts, guard.auxiliary):
            trace(network)
    except CannotCut:
        return []
    makers: dict[str, list[Callable[[Guard, Tensor], Program]]] = {
        "cpu": [_traced, partial(_with_onnx, threads=threads)],
        "cuda": [partial(recorded, most=most)],
    }
    counts = sizes(most) if images.is_cuda else [8, 1, 3]  # a trace is valid for every number of images, a CUDA graph for its own only
    made = []
    with torch.no_grad(), _kept_by_nothing_else(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each size that becomes a constant; whether that is right is tried below
        for make in makers.get(images.device.type, []):
            try:
                program = make(guard, images[:2])
                if all(_alike(program(part, ungated=True), guard(part, ungated=True)) for part in (repeated(images, count) for count in counts)):
                    made.append(program)
            except Exception:  # noqa: BLE001, S112 - whatever a foreign network raises here, the guard can still run it
                continue
    return made


def recorded(guard: Guard, images: Tensor, most: int, recorder: Recorder | None = None) -> Program:
    """On a GPU. For batches of up to `most` images; larger ones are run step by step."""
    recorder = recorder or Recorder(images.device)
    look = Recorded(OfLists(guard, guard.look), [images], most, recorder)
    ask = Recorded(OfLists(guard, lambda *rows: guard.ask(Seen(*rows))), list(guard.look(images)), most, recorder)
    return Program(NoFlow(), Gated(look, ask, guard.order.experts_first), guard.order)


def _traced(guard: Guard, images: Tensor) -> Program:
    return Program(NoFlow(), _gated(guard, guard.look, [images]), guard.order)


def _with_onnx(guard: Guard, images: Tensor, threads: int) -> Program:
    step = OfLists(guard, lambda pixels: guard.flow(guard.preprocessing.normalise(pixels)))
    flow, rest = OnnxFlow(step, images, threads, guard.parts), without(guard, guard.parts)

    def look(pixels: Tensor, shared: Tensor, *others: Tensor) -> Seen:
        fast = shared.contiguous(memory_format=torch.channels_last) if shared.ndim == 4 else shared  # with what the experts are fast
        return rest.weigh(pixels, fast, *others)

    return Program(flow, _gated(rest, look, [images, *flow(images)]), guard.order)


def _gated(guard: Guard, look: Callable[..., Seen], values: list[Tensor]) -> nn.Module:
    """A guard's two steps, and the gate between them."""
    look_at, ask = _trace(guard, look, values), _trace(guard, lambda *rows: guard.ask(Seen(*rows)), list(look(*values)))
    made: nn.Module = torch.jit.script(Gated(look_at, ask, guard.order.experts_first))
    return made


def _trace(guard: Guard, method: Callable[..., Any], example: list[Tensor]) -> nn.Module:
    made: nn.Module = torch.jit.trace(OfLists(guard, method), (example,), check_trace=False, strict=False)  # not strict: that it gives a list is meant
    return made.eval()


def without(guard: Guard, *left: nn.Module) -> Guard:
    """The same guard, whose other modules stay its own; what needs those that are left away raises AttributeError."""
    lean = copy.copy(guard)
    lean._modules = {name: module for name, module in guard._modules.items() if not any(module is each for each in left)}
    return lean


def repeated(images: Tensor, count: int) -> Tensor:
    """So many of the images [N, ...], some of them repeatedly where N is less."""
    return images[torch.arange(count, device=images.device) % len(images)]


def fastest(candidates: Sequence[nn.Module], images: Tensor) -> nn.Module:
    """By the geometric mean over BATCHES of the best turn at a look at so many of the images, some of them repeatedly.

    The best, since what else the machine does makes a turn slower, never faster, and seldom all turns of one of them. Of a large network the
    smaller batches have to do.
    """
    logs = [0.0 for _ in candidates]
    for batch in BATCHES:
        shown, turns = repeated(images, batch), list[list[float]]()
        while len(turns) < ROUNDS or sum(map(sum, turns)) < SECONDS:
            turns.append([_seconds(each, shown) for each in candidates])
        logs = [log + math.log(min(of_one)) for log, of_one in zip(logs, zip(*turns, strict=True), strict=True)]
        if sum(map(sum, turns)) > 4 * SECONDS:
            break
    return candidates[logs.index(min(logs))]


@torch.inference_mode()
def _seconds(network: nn.Module, images: Tensor) -> float:
    """Of a look alone, in which candidates differ: what follows the gate is the same for all, and reference images would reach it too often."""
    began = time.perf_counter()
    cast(Any, network).look(images)
    return time.perf_counter() - began


@contextmanager
def _kept_by_nothing_else() -> Iterator[None]:
    """What is traced in here goes when its program goes. TorchScript would keep it for as long as the process lives, ten MiB for each bundle that is loaded."""
    with _TRACING:
        unit, types = torch.jit._state._python_cu, torch.jit._recursive.concrete_type_store
        torch.jit._state._python_cu, torch.jit._recursive.concrete_type_store = torch._C.CompilationUnit(), torch.jit._recursive.ConcreteTypeStore()
        try:
            yield
        finally:
            torch.jit._state._python_cu, torch.jit._recursive.concrete_type_store = unit, types


def _alike(one: Judgement, other: Judgement) -> bool:
    return all(torch.allclose(value, getattr(other, name), rtol=TOLERANCE, atol=TOLERANCE) for name, value in vars(one).items())
