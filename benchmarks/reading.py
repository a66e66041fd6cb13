"""What reading safely costs: `python -m benchmarks.reading` reads a ViT-B/16 of 346 MB with our readers and with safetensors' own loader.

Each run is a process of its own that reads five times, the readers taking turns; every tensor is added up after loading, since maps of a file cost
nothing until they are read. Prints medians of seconds and of the memory that loading and adding took at most, and their ratios to the library's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

READERS = ("library", "safetensors", "torch-zip")


def read(reader: str, path: Path) -> dict[str, Tensor]:
    """The state dict in a file, by one of READERS."""
    if reader == "library":
        from safetensors.torch import load_file

        return load_file(path)
    from models.checkpoint import read_checkpoint

    return read_checkpoint(path).tensors


def measure(reader: str, path: Path, repeats: int = 5) -> dict[str, float]:
    """Seconds (median of a few readings) and peak bytes (of the first) in this process, which must be new."""
    read(reader, path.with_name("small" + path.suffix))  # imports and first uses
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, peak, loads, totals = _status("VmRSS"), 0, [], []
    for _ in range(repeats):
        started = time.perf_counter()
        tensors = read(reader, path)
        loads.append(time.perf_counter() - started)
        sum(float(tensor.sum()) for tensor in tensors.values())
        totals.append(time.perf_counter() - started)
        peak = peak or _status("VmHWM") - before
        del tensors
    return {"load_seconds": median(loads), "seconds": median(totals), "peak_bytes": peak}


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def _make(folder: Path) -> dict[str, Path]:
    from safetensors.torch import save_file
    from torchvision.models import vit_b_16

    paths = {"library": folder / "model.safetensors", "safetensors": folder / "model.safetensors", "torch-zip": folder / "model.pt"}
    writers: dict[str, Callable[[dict[str, Tensor], Path], object]] = {"safetensors": save_file, "torch-zip": torch.save}
    for kind, write in writers.items():
        write(dict(vit_b_16(num_classes=1000).state_dict()) if kind == "safetensors" else vit_b_16(num_classes=1000).state_dict(), paths[kind])
        write({"weight": torch.zeros(8)}, paths[kind].with_name("small" + paths[kind].suffix))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--one", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = _make(Path(folder))
        runs: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
        for _ in range(args.runs):
            for reader in READERS:
                command = [sys.executable, "-m", "benchmarks.reading", "--one", reader, str(paths[reader])]
                runs[reader].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"ViT-B/16, {paths['library'].stat().st_size / 1e6:.0f} MB, {args.runs} runs each, one thread, file in the page cache")
        base = {key: median(run[key] for run in runs["library"]) for key in runs["library"][0]}
        for reader in READERS:
            found = {key: median(run[key] for run in runs[reader]) for key in base}
            print(
                f"{reader:12} load {found['load_seconds']:.3f} s, with every byte read {found['seconds']:.3f} s ({found['seconds'] / base['seconds']:.2f}x), "
                f"peak {found['peak_bytes'] / 1e6:.0f} MB ({found['peak_bytes'] / base['peak_bytes']:.2f}x)"
            )


if __name__ == "__main__":
    main()
