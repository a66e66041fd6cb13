"""Cut a network into a shared trunk and a tail.

The network is traced once (torch.fx). A place to cut is a node through which everything flows: no later node looks at anything before it, so
that one tensor is all that the tail needs. Residual connections and attention blocks are never torn. A cut is named by its node, which
the same network always traces to; the trunk and the tail of an uncut copy share its modules.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Cut:
    """A place to cut: the node's name, and the share of the network's multiplications that lie behind it."""

    name: str
    tail_share: float


class _Counting(fx.Interpreter):
    """Runs a traced network and keeps the multiplications of each node: those of weights and of matrix products, which is nearly all there is.

    (torch's own counter knows more operations, and imports for five seconds.)
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.operations: dict[str, int] = {}
        self._now = 0

    def run_node(self, n: fx.Node) -> Any:
        self._now = 0
        result = super().run_node(n)
        self.operations[n.name] = 2 * self._now
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        module, output = self.fetch_attr(target), result[0] if isinstance(result, tuple) else result
        channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
        # Each weight is used once at each place of the output.
        self._now = sum(weight.numel() for weight in module.parameters() if weight.ndim > 1) * output.numel() // channels
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target in (F.linear, F.conv2d):
            channels = result.shape[1] if target is F.conv2d else result.shape[-1]
            self._now = args[1].numel() * result.numel() // channels
        elif target in (torch.matmul, torch.bmm, operator.matmul):
            self._now = result.numel() * args[0].shape[-1]
        return result


def cuts(network: nn.Module, example: Tensor) -> list[Cut]:
    """All places to cut, from the input to the output. example: one normalised input [1, 3, H, W]."""
    traced = fx.symbolic_trace(network.eval())
    operations = _operations(traced, example)
    total = sum(operations.values())
    nodes = list(traced.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    reach, done, found = 0, 0, []
    for index, node in enumerate(nodes[:-2]):  # the last two are the logits and the output itself
        done += operations[node.name]
        if node.op != "placeholder" and reach <= index and node.users:
            found.append(Cut(node.name, 1 - done / total))
        reach = max([reach, *(position[user] for user in node.users)])
    return found


def _operations(traced: fx.GraphModule, example: Tensor) -> dict[str, int]:
    counting = _Counting(traced)
    with torch.no_grad():
        counting.run(example)
    return counting.operations


def operations(network: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass; two for each multiply-accumulate."""
    return sum(_operations(fx.symbolic_trace(network.eval()), example).values())


def feature_cut(network: nn.Module, example: Tensor) -> Cut:
    """The last cut that has any multiplication behind it: what the head reads, the penultimate features."""
    return [cut for cut in cuts(network, example) if cut.tail_share > 0][-1]


def choose_cut(network: nn.Module, example: Tensor, tail_share: float) -> Cut:
    """The deepest cut that leaves at least `tail_share` of the multiplications in the tail."""
    candidates = [cut for cut in cuts(network, example) if cut.tail_share >= tail_share]
    if not candidates:
        raise ValueError(f"no cut leaves {tail_share:.0%} of the network behind it")
    return candidates[-1]


def split(network: nn.Module, *names: str) -> list[fx.GraphModule]:
    """Cut at each of `names`, in the order in which data flows: the parts, one after another, are the network, operation for operation.

    All share the network's own modules. Raises KeyError where the network has no cut of a name.
    """
    nodes = list(fx.symbolic_trace(network.eval()).graph.nodes)
    by_name = {node.name: index for index, node in enumerate(nodes)}
    borders = [by_name[name] for name in names]
    parts = []
    for begin, end in zip([-1, *borders], [*borders, len(nodes) - 1], strict=True):
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        if begin >= 0:
            copies[nodes[begin]] = graph.placeholder("features")
        for node in nodes[begin + 1 : end + 1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if end < len(nodes) - 1:
            graph.output(copies[nodes[end]])
        parts.append(fx.GraphModule(network, graph).eval())
    return parts


def tail_copy(network: nn.Module, cut: str | None) -> nn.Module:
    """A tail of its own, apart from the network's weights: what an expert is trained from. Without a cut, the whole network."""
    return copy.deepcopy(network if cut is None else split(network, cut)[-1])
