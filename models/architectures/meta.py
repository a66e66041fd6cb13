"""Networks without memory for their weights: enough to know keys and shapes, or to be filled with a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from models.errors import ConfigInvalid


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, on the meta device; on the CPU with random weights where it computes with tensors while it builds."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError, ConfigInvalid):  # the last is how a network of the operator's says the others
        return build()
