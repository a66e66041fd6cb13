"""The clean images that a search looks at, and what a preprocessing makes of them before the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from calibration.preprocessing.norm_statistics import zoom
from models.preprocessing import Preprocessing

KEPT = 100_000_000  # pixels of decoded images that are kept


class Images:
    """The images to look at, decoded once where they are small, and as pixels of one geometry at a time."""

    def __init__(self, image: Callable[[int], Image.Image], rows: Sequence[int]) -> None:
        self._image, self._rows = image, rows
        self._kept: dict[int, Image.Image] = {}
        self._room = KEPT
        self._geometry, self._pixels = Preprocessing(), list[Tensor]()
        self._crops: dict[Preprocessing, Tensor] = {}
        self.sides = [self[place].size for place in range(min(len(rows), 20))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Image.Image:
        if place in self._kept:
            return self._kept[place]
        image = self._image(self._rows[place])
        if (size := image.width * image.height) <= self._room:
            self._kept[place] = image
            self._room -= size
        return image

    def pixels(self, geometry: Preprocessing, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, 3, size, size]."""
        if geometry != self._geometry:
            self._geometry, self._pixels = geometry, []
        self._pixels += [geometry.pixels(self[place]) for place in range(len(self._pixels), stop)]
        return torch.stack(self._pixels[start:stop])

    def crops(self, geometry: Preprocessing) -> Tensor:
        """All images as random resized crops to the size and with the interpolation of this geometry, uint8 [N, 3, size, size]."""
        square = replace(geometry, resize=geometry.size, aspect="stretch")
        if square not in self._crops:
            self._crops[square] = torch.stack([square.pixels(zoom(self[place], seed=place)) for place in range(len(self))])
        return self._crops[square]
