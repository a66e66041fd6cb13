"""In which form experts and auxiliary are served: batch norms folded into the convolutions before them, and weights in bfloat16.

They also compute in it where the device is fast at that; elsewhere each weight becomes the same number in float32 when it is used, which takes a small part
of the time of the product that it is used in.

The suspect is folded too, but keeps float32: its answers must stay its own. A calibration lowers before it measures anything, so that its threshold is one
of the networks that serve.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from models.trunk import CannotCut, trace


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, several times faster than float32; elsewhere it is emulated and slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def lowered(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network as `device` serves it."""
    return halved(folded(network), device)


def folded(network: nn.Module) -> nn.Module:
    """A copy that computes the same with fewer steps; a plain copy where the network's code cannot be traced."""
    try:
        traced = trace(copy.deepcopy(network))
    except CannotCut:
        return copy.deepcopy(network).eval()
    modules = dict(traced.named_modules())
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = modules[str(before.target)], modules[str(node.target)]
        shared = called.count(before.target) > 1 or called.count(node.target) > 1
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.running_var is not None and not shared:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


class _HalfConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(input, self.weight.float(), self.bias)
        return convolved


class _HalfLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.float(), self.bias)


_HALF: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _HalfConv2d, nn.Linear: _HalfLinear}


def halved(network: nn.Module, device: torch.device) -> nn.Module:
    """The same network, in place, with weights in bfloat16; it computes in what `device` is fast at."""
    if has_fast_bf16(device):
        return in_bf16(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and type(module) in _HALF:
            module.__class__ = _HALF[type(module)]  # type: ignore[assignment] # the names of its weights stay as they are
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return network


def in_bf16(network: nn.Module) -> nn.Module:
    """The same network, in place, in bfloat16; batch norms keep float32, since three digits of a variance would shift everything behind them."""
    network.to(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return network


def dtype_of(network: nn.Module) -> torch.dtype:
    """In which the network computes: what its inputs have to be."""
    first = None
    for module in network.modules():
        if type(module) in _HALF.values():
            return torch.float32
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == torch.bfloat16:  # norms in front of it are in float32
                return torch.bfloat16
            first = first or parameter.dtype
    return first or torch.float32
