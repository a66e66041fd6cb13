"""A function of batches as a GPU runs it at once: CUDA graphs of a few batch sizes.

Launched one by one, the kernels of a small network take the interpreter longer than they take the GPU. A graph launches all of them in one call, but always
at the same addresses and of the same shapes: a batch is copied into the first rows of what was recorded for the next larger size, and its rows of the answer
are copied out before anything else is run. What the other rows hold is left over from before; a network in evaluation mode answers each row by itself.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable
from itertools import chain
from typing import ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

WARM_UPS = 3  # calls in which a function makes what it makes but once: workspaces, constants
STREAMS = 32  # that torch gives in turn


class Recording(NamedTuple):
    """What was recorded of one batch size."""

    replay: Callable[[], None]  # computes the outputs anew, from what the inputs hold by then
    outputs: list[Tensor]


class Recorder:
    """Records functions one after the other, into memory that all its recordings share: they are replayed one at a time, and none may need what another left.

    It has a stream of its own for as long as it lives. Where matrices are multiplied a graph works in memory that torch keeps for a stream, and some versions
    take it away with any graph that was recorded there. Raises RuntimeError where other recorders have all streams.
    """

    _living: ClassVar[WeakSet[Recorder]] = WeakSet()

    def __init__(self, device: torch.device) -> None:
        taken = {each._stream.cuda_stream for each in self._living}
        with torch.cuda.device(device):
            given = (torch.cuda.Stream() for _ in range(STREAMS))
            stream = next((each for each in given if each.cuda_stream not in taken), None)
        if stream is None:
            raise RuntimeError("Every stream of the GPU is taken.")
        self._stream: torch.cuda.Stream = stream
        self._pool, self.replaying = torch.cuda.graph_pool_handle(), threading.Lock()
        self._living.add(self)

    def record(self, function: nn.Module, inputs: list[Tensor]) -> Recording:
        """Of tensors on the recorder's GPU. Raises RuntimeError where the function does what a graph cannot, such as to look at a value."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function(inputs)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # nothing is given back while a graph is recorded
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # of this thread: other guards go on judging in theirs
            try:
                outputs = list(function(inputs))
            finally:
                graph.capture_end()
        return Recording(graph.replay, outputs)


class Recorded(nn.Module):
    """Answers as its function does for batches of at most `most` rows, and lets it answer larger ones itself.

    The function takes and gives lists of tensors with one row an image, [N, ...] each.
    """

    def __init__(self, function: nn.Module, example: list[Tensor], most: int, recorder: Recorder) -> None:
        """example: inputs of any batch size of at least 1."""
        super().__init__()
        self.function, self.sizes = function, sizes(most)
        self._inputs = [each[:1].repeat(most, *(1 for _ in each.shape[1:])) for each in example]
        # From the largest: what it used is then large enough for all others.
        self._recordings = {size: recorder.record(function, [each[:size] for each in self._inputs]) for size in reversed(self.sizes)}
        self._recorder = recorder

    def forward(self, values: list[Tensor]) -> list[Tensor]:
        rows = len(values[0])
        if rows > self.sizes[-1]:
            return list(self.function(values))
        recording = self._recordings[self.sizes[bisect.bisect_left(self.sizes, rows)]]
        with self._recorder.replaying:
            for held, value in zip(self._inputs, values, strict=True):
                held[:rows].copy_(value)
            recording.replay()
            return [each[:rows].clone() for each in recording.outputs]


def sizes(most: int) -> list[int]:
    """Powers of two, what lies in the middle between them, and `most`: at least two thirds of what is computed is asked for."""
    powers = [2**power for power in range(most.bit_length())]
    return sorted({each for each in chain(powers, (3 * power // 2 for power in powers), [most]) if each <= most})
