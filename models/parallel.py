"""How many CPU threads a network is worth."""

from __future__ import annotations

import os

import torch
from torch import nn

from models.trunk import operations

# Below this many operations an image, a second thread waits more than it works; and where another process wants the core, threads that wait for one
# another make everything several times slower (measured with a ResNet-20 on two cores: 13 ms an image instead of 3). A calibration of its own on idle cores
# would gain a third by a second thread (AVX2); beside other work it then took more than five minutes instead of one and a half.
SMALL_OPERATIONS = 500_000_000


def cpu_threads(network: nn.Module, size: int) -> int:
    """1 for a small network, one a core otherwise; by the network alone, since the number decides the last bits of what is computed."""
    small = operations(network, torch.zeros(1, 3, size, size)) < SMALL_OPERATIONS
    return 1 if small else len(os.sched_getaffinity(0))
