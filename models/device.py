"""The device that a name stands for."""

from __future__ import annotations

import torch

from models.errors import ConfigInvalid


def find_device(name: str) -> torch.device:
    """`auto`, or a name as torch has it; `auto` is a GPU where there is one. Raises ConfigInvalid where nothing can be computed there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except torch.OutOfMemoryError as error:
        raise ConfigInvalid(f"The device {name!r} has no free memory. Stop what else uses it, or name another device.") from error
    except (RuntimeError, AssertionError) as error:  # the second is what a torch without CUDA says of cuda
        raise ConfigInvalid(f"The device {name!r} cannot be used here; auto, cpu and, with a GPU, cuda can.") from error
    return device


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no memory left; some of CUDA's libraries say so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
