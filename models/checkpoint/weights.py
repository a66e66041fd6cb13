"""Tensors of a checkpoint -> weights to compute with: known types, finite, and not those of an untrained or damaged network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.checkpoint.limits import listed
from models.checkpoint.reading import Checkpoint
from models.errors import CheckpointDegenerate, CheckpointDtype, CheckpointNotFinite

HUGE = 1e30  # no trained weight is so large, and its square overflows float32
_TINY = torch.finfo(torch.float32).tiny
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Floating weights as float32, int64 and int32 buffers as they are; they may share memory with the checkpoint's and with each other.

    Raises CheckpointDtype, CheckpointNotFinite or CheckpointDegenerate.
    """
    floats = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.dtype in _FLOATS}
    if wrong := [name for name, tensor in checkpoint.tensors.items() if tensor.dtype not in (*_FLOATS, *_INTEGERS)]:
        kinds = ", ".join(sorted({str(checkpoint.tensors[name].dtype).removeprefix("torch.") for name in wrong}))
        raise CheckpointDtype(f"Weights of type {kinds} are not taken: {listed(wrong)}. Save them as float32, float64, float16 or bfloat16.")
    bounds = {name: [bound.item() for bound in tensor.aminmax()] for name, tensor in floats.items() if tensor.numel()}
    if wrong := [name for name, pair in bounds.items() if not all(map(math.isfinite, pair))]:  # aminmax hands NaN on
        raise CheckpointNotFinite(f"These weights hold NaN or infinity: {listed(wrong)}. Nothing can be scored with them.")
    peaks = {name: max(-low, high) for name, (low, high) in bounds.items()}
    if wrong := [name for name, peak in peaks.items() if peak >= HUGE]:
        raise CheckpointDegenerate(f"These weights are as large as {HUGE:.0e} or larger: {listed(wrong)}.")
    # Single layers may be zero (a last normalisation often starts so), and so may every bias; not every matrix and kernel.
    judged = [peak for name, peak in peaks.items() if floats[name].dim() > 1] or list(peaks.values())
    if max(judged, default=0.0) < _TINY:
        raise CheckpointDegenerate("All weights are zero, or too small to be normal float32 numbers.")
    # One channel of variance 0 is a dead one, which trained networks have; a layer of them, or a negative one, is damage.
    if wrong := [name for name, (low, high) in bounds.items() if name.endswith("running_var") and (low < 0 or high <= 0)]:
        raise CheckpointDegenerate(f"These running variances are negative, or zero in every channel: {listed(wrong)}.")
    return {name: tensor.float() if name in floats else tensor for name, tensor in checkpoint.tensors.items()}
