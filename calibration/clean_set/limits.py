"""How large a clean set may be. Every reader in this package takes its caps from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes. The defaults bound the reader's own memory to about `memory_bytes` plus one decoded image."""

    file_bytes: int = 4 << 30  # the uploaded file; of a folder, all its files together
    entries: int = 200_000  # members of an archive or files in a folder, litter included
    images: int = 50_000
    image_bytes: int = 10 << 20  # one encoded image
    inflated_bytes: int = 8 << 30  # all members of an archive, inflated
    memory_bytes: int = 1 << 30  # images kept in memory, where the container (tar.gz, Parquet, npz) cannot be read at random
    pixels: int = 20_000_000_000  # all images, decoded: a few minutes on one core
    min_images: int = 100  # fewer cannot promise a 1 % false-rejection rate


MAX_RATIO = 100  # images barely deflate; what inflates a hundredfold is a bomb
RATIO_FREE = 1 << 20  # below this size the ratio does not matter
SIDECAR_BYTES = 32 << 20  # metadata.csv or metadata.jsonl
LABEL_BYTES = 1 << 20  # the label beside one image
