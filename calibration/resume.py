"""The networks of finished stages, kept while a calibration runs: one that was stopped goes on behind them.

Training is deterministic (but for some layers on a GPU), so that what is read back is what would be trained again. It is kept under a fingerprint of everything
that decided it: what was kept of another suspect, another clean set or other settings is not taken, and neither is a file that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models import bundle
from models.durable import write_file

KEPT_SECONDS = 7 * 24 * 3600.0  # until what nobody went on with is given up
HOW = 2  # stages are made, and kept: raised where either changes, so that what an earlier release kept is made anew
NAMED = re.compile("[0-9a-f]{16}")  # what is kept; the folder may be one that holds other things
Made = tuple[list[nn.Module], dict[str, Any]]  # networks, and what is to be known of how they were made, as JSON has it


class Resume:
    """A folder for what one calibration has finished; without a folder nothing is kept, and everything is made."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self._folder = None if folder is None else folder / fingerprint[:16]  # beside what others, of other settings, have not finished
        self._fingerprint = fingerprint
        self.taken: list[str] = []  # stages that were not made anew

    def networks(self, stage: str, blank: Callable[[], list[nn.Module]], make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave before it was stopped in a later stage; `blank` gives networks of the same shapes."""
        if self._folder is None:
            return make()
        path = self._folder / f"{stage}.safetensors"
        kept = self._read(path, blank)
        if kept is not None:
            self.taken.append(stage)
            return kept
        networks, known = make()
        tensors = {
            f"{index}.{name}": value.detach().cpu().clone().contiguous()
            for index, network in enumerate(networks)
            for name, value in network.state_dict().items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(path, save(tensors, {"fingerprint": self._fingerprint, "known": json.dumps(known)}))
        return networks, known

    def done(self) -> None:
        """The calibration is published, and nothing of this is needed any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                for other in self._folder.parent.iterdir():
                    if NAMED.fullmatch(other.name) and time.time() - other.stat().st_mtime > KEPT_SECONDS:
                        shutil.rmtree(other)
                self._folder.parent.rmdir()  # raises where others are not done

    def _read(self, path: Path, blank: Callable[[], list[nn.Module]]) -> Made | None:
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self._fingerprint:
                    return None
                known = json.loads(about["known"])
                networks = blank()
                for index, network in enumerate(networks):
                    network.load_state_dict({name: file.get_tensor(f"{index}.{name}") for name in network.state_dict()})
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None  # not there, or not what was written: made again
        return [network.eval() for network in networks], known


def fingerprint(values: Iterable[Any], tensors: Iterable[Tensor]) -> str:
    """SHA-256 of everything that decides what is trained: values as JSON has them, and tensors bit by bit.

    The bundles' schema is part of it: canaries chose by the score of their day.
    """
    digest = hashlib.sha256(json.dumps([torch.__version__, bundle.SCHEMA, HOW, *values], sort_keys=True, default=str).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
