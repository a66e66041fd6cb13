"""Cut a network into a shared trunk and a tail.

The network is traced once (torch.fx). A place to cut is a node through which everything flows: no later node looks at anything before it, so
that one tensor is all that the tail needs. Residual connections and attention blocks are never torn. A cut is named by its node, which
the same network always traces to; the trunk and the tail of an uncut copy share its modules.
"""

from __future__ import annotations

import copy
import linecache
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = torch.ops.aten


class CannotCut(ValueError):
    """The network cannot be traced, or has no place to cut that leaves enough behind it: only whole copies of it can be trained."""


@dataclass(frozen=True)
class Cut:
    """A place to cut: the node's name, the share of the network's multiplications that lie behind it, and the shape of what flows there, [1, ...]."""

    name: str
    tail_share: float
    shape: tuple[int, ...]


class _Multiplications(TorchDispatchMode):
    """Counts those of convolutions, matrix products and attention, which is nearly all there is, in whatever module they happen.

    (torch's own counter knows more operations, and brings slow imports with it.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.results = 0  # elements that any operation gave

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, for seconds, to tell it to leave this alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.results += result.numel() if isinstance(result, Tensor) else 0
        match func.overloadpacket:
            case _OPS.convolution:  # each weight is used once at each place of the output
                self.total += args[1].numel() * result.numel() // result.shape[1]
            case _OPS.mm | _OPS.bmm:
                self.total += result.numel() * args[0].shape[-1]
            case _OPS.addmm | _OPS.baddbmm:
                self.total += result.numel() * args[1].shape[-1]
            case packet if packet.__name__.startswith("_scaled_dot_product"):  # query [N, H, T, D], key [N, H, S, D], value [N, H, S, E]
                query, key, value = args[:3]
                self.total += query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * value.shape[-2] * value.shape[-1]
            case _OPS._native_multi_head_attention | _OPS._transformer_encoder_layer_fwd:  # tokens [N, T, E] through every matrix, and attention
                matrices = sum(each.numel() for each in args if isinstance(each, Tensor) and each.ndim == 2)
                self.total += args[0].numel() // args[0].shape[-1] * matrices + 2 * args[0].numel() * args[0].shape[-2]
        return result


_ONE_AT_A_TIME = threading.RLock()  # a tracer takes the place of methods of all modules, and puts back what it found there


class _Tracer(fx.Tracer):
    """Takes for one step what cannot be traced through: blocks of transformers, and what timm marks so among its own.

    While it traces, the calls and attributes of all modules of the process come to it, also those of networks that serve meanwhile in other threads.
    """

    proxy_buffer_attributes = True  # else what is computed from buffers (the index of a window's positions) is frozen under a new name each time

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        timm: Any = sys.modules.get("timm.layers")  # never imported here: a network of timm's has done so
        self.leaves = tuple(timm.get_notrace_modules()) if timm else ()
        super().__init__(autowrap_functions=tuple(timm.get_notrace_functions()) if timm else ())

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._is_ours() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_ours() else attr_val

    def _is_ours(self) -> bool:
        return threading.get_ident() == self.thread

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, self.leaves) or type(m).__module__.startswith("transformers.")
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]  # what else `forward` takes keeps its default


class _Traced(fx.GraphModule):
    """Leaves nothing behind when it goes: torch keeps the source of each graph's code for as long as the process lives, 2 KiB forty times for each bundle."""

    def recompile(self) -> Any:
        made = super().recompile()
        name = type(self).forward.__code__.co_filename
        linecache.cache.pop(name, None)
        fx.graph_module._loader.eval_cache.pop(name, None)
        return made


def trace(network: nn.Module) -> fx.GraphModule:
    """Its graph, in eval mode; the modules are its own. Raises CannotCut."""
    try:
        with _ONE_AT_A_TIME:
            return _Traced(network, _Tracer().trace(network.eval()))
    except Exception as error:  # what a forward raises when it meets a symbol instead of a tensor is up to that forward
        raise CannotCut(f"a {type(network).__name__} cannot be traced") from error


def _constant(nodes: list[fx.Node]) -> set[fx.Node]:
    """What is computed from weights alone (position embeddings): each part can compute it anew."""
    found = set[fx.Node]()
    for node in nodes:
        if node.op == "get_attr" or (node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


class _Measuring(fx.Interpreter):
    """Runs a traced network and keeps of each node its multiplications and, where it is a tensor, the value with its version."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.multiplications: dict[fx.Node, int] = {}
        self.values: dict[fx.Node, tuple[Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _Multiplications() as counted:
            result = super().run_node(n)
        self.multiplications[n] = counted.total
        if isinstance(result, Tensor):
            self.values[n] = result, result._version
        return result


def cuts(network: nn.Module, example: Tensor) -> list[Cut]:
    """All places to cut, from the input to the output. example: one normalised input [1, 3, H, W]. Raises CannotCut."""
    traced = trace(network)
    measuring = _Measuring(traced)
    with torch.no_grad():
        measuring.run(example)
    total = sum(measuring.multiplications.values())
    nodes = list(traced.graph.nodes)
    position, constant = {node: index for index, node in enumerate(nodes)}, _constant(nodes)
    reach, done, found = 0, 0, []
    for index, node in enumerate(nodes[:-2]):  # the last two are the logits and the output itself
        done += measuring.multiplications[node]
        if node in constant:
            continue
        # Nobody may write to the tensor later: several tails read the same one.
        value, version = measuring.values.get(node, (None, 0))
        if node.op != "placeholder" and reach <= index and node.users and value is not None and value._version == version:
            found.append(Cut(node.name, 1 - done / total, tuple(value.shape)))
        reach = max([reach, *(position[user] for user in node.users)])
    return found


def operations(network: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass; two for each multiply-accumulate."""
    with torch.no_grad(), _Multiplications() as counted:
        network.eval()(example)
    return 2 * int(counted.total)


def workload(network: nn.Module, example: Tensor) -> int:
    """Operations of one forward pass, where each element of a result counts as another 100: thin and depthwise layers wait for memory.

    With it, networks from ResNet-20 to ViT-B/16 take the same time for the same workload within a factor of 2.5 on a CPU; by the multiplications alone
    MobileNetV2 would seem five times cheaper than it is.
    """
    with torch.no_grad(), _Multiplications() as counted:
        network.eval()(example)
    return 2 * int(counted.total) + 100 * int(counted.results)


def feature_cut(network: nn.Module, example: Tensor) -> Cut:
    """The last cut that has any multiplication behind it: what the head reads, the penultimate features."""
    return _last(cuts(network, example), 1e-12)


def choose_cut(network: nn.Module, example: Tensor, tail_share: float) -> Cut:
    """The deepest cut that leaves at least `tail_share` of the multiplications in the tail. Raises CannotCut."""
    return _last(cuts(network, example), tail_share)


def places(network: nn.Module, example: Tensor, tail_shares: Sequence[float]) -> list[Cut]:
    """Cuts at several depths, in the order of flow: the deepest ones that leave each of `tail_shares`, the last map or token sequence, the head's input.

    Some may coincide: fewer come back then. Raises CannotCut.
    """
    found = cuts(network, example)
    maps = [cut for cut in found if sum(length > 1 for length in cut.shape[1:]) > 1]
    chosen = {*(_last(found, share) for share in tail_shares), *maps[-1:], _last(found, 1e-12)}
    return [cut for cut in found if cut in chosen]


def _last(candidates: list[Cut], tail_share: float) -> Cut:
    try:
        return [cut for cut in candidates if cut.tail_share >= tail_share][-1]
    except IndexError:
        raise CannotCut(f"no cut leaves {tail_share:.0%} of the network behind it") from None


def split(network: nn.Module, *names: str) -> list[fx.GraphModule]:
    """Cut at each of `names`, in the order in which data flows: the parts, one after another, are the network, operation for operation.

    All share the network's own modules. Raises KeyError where the network has no cut of a name.
    """
    nodes = list(trace(network).graph.nodes)
    by_name, constant = {node.name: index for index, node in enumerate(nodes)}, _constant(nodes)
    borders = [by_name[name] for name in names]
    parts: list[fx.GraphModule] = []
    for begin, end in zip([-1, *borders], [*borders, len(nodes) - 1], strict=True):
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        if begin >= 0:
            copies[nodes[begin]] = graph.placeholder("features")
        for index, node in enumerate(nodes[: end + 1]):
            if index > begin or node in constant:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        if end < len(nodes) - 1:
            graph.output(copies[nodes[end]])
        for node in reversed(nodes[: end + 1]):
            if node in constant and not copies[node].users:
                graph.erase_node(copies[node])
        parts.append(_Traced(network, graph).eval())
    return parts


def tail_copy(network: nn.Module, cut: str | None) -> nn.Module:
    """A tail of its own, apart from the network's weights: what an expert is trained from. Without a cut, the whole network."""
    return copy.deepcopy(network if cut is None else split(network, cut)[-1])
