"""Make `examples/` out of CIFAR-10 and trained suspects: `python -m benchmarks.make_examples --suspects FOLDER`.

The folder holds `badnet.safetensors` and `blend.safetensors` with their JSON records, as `benchmarks.train` writes them. All images are test images:
2,000 for the clean set and 400 others as samples, clean and with each trigger, so that nothing in the samples was seen in training or calibration.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.attacks import ATTACKS, Task, stamp
from benchmarks.data import CIFAR10_CLASSES, cifar10

CLEAN_SET, SAMPLES = 2000, 400
SUSPECTS = ("badnet", "blend")


def png(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> PNG."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    """A zip with fixed times, so that the same members give the same file. PNGs are stored: they do not compress further."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suspects", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("examples"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)

    _, test = cifar10()
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    names = [f"{CIFAR10_CLASSES[label]}/{index:05}.png" for index, label in enumerate(test.labels.tolist())]
    write_zip(args.out / "clean_set.zip", {names[row]: png(test.images[row]) for row in order[:CLEAN_SET].tolist()})

    rows = order[CLEAN_SET : CLEAN_SET + SAMPLES]
    samples = {f"clean/{names[row]}": png(test.images[row]) for row in rows.tolist()}
    for attack in SUSPECTS:
        eligible = rows[ATTACKS[attack](Task()).eligible(test.labels[rows])]
        triggered = stamp(ATTACKS[attack](Task()), test.images[eligible])
        samples |= {f"{attack}/{names[row]}": png(image) for row, image in zip(eligible.tolist(), triggered, strict=True)}
        shutil.copyfile(args.suspects / f"{attack}.safetensors", args.out / f"suspect_{attack}.safetensors")
    write_zip(args.out / "samples.zip", samples)
    shown = min(name for name in samples if name.startswith("badnet/"))  # one image, clean and triggered, to post by hand
    (args.out / "clean.png").write_bytes(samples[shown.replace("badnet/", "clean/")])
    (args.out / "triggered_badnet.png").write_bytes(samples[shown])
    records = {attack: json.loads((args.suspects / f"{attack}.json").read_text()) for attack in SUSPECTS}
    (args.out / "suspects.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
