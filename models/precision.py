"""In which precision networks run on a device."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, several times faster than float32; elsewhere it is emulated and slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def lowered(network: nn.Module) -> nn.Module:
    """The same network, in place, in bfloat16; batch norms keep float32, since three digits of a variance would shift everything behind them."""
    network.to(torch.bfloat16)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return network


def dtype_of(network: nn.Module) -> torch.dtype:
    """That of the network's first weights: what its inputs have to be."""
    return next((parameter.dtype for parameter in network.parameters()), torch.float32)
