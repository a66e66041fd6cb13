"""Which images are the same, exactly or nearly: one on each side of a split makes the promised FPR a lie.

Two images are near duplicates when their thumbnails correlate, mirrored or not, at two resolutions: 8x8 with colour kept finds candidates
in one matrix product, 16x16 with each channel's mean removed rejects skies and horizons. Brightness, contrast, JPEG, noise and rescaling
are seen through; crops and shifts of more than a few percent are not.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, COARSE = 16, 8
COARSE_MATCH, FINE_MATCH = 0.97, 0.92
MIN_CONTRAST = 2.0  # grey levels, standard deviation: what is flatter has only noise to compare
_BLOCK = 128
_CANDIDATES = 64  # of one image, the most alike: bounds the time where all images are alike

Float = NDArray[np.float32]


def digest(image: Image.Image) -> bytes:
    """Equal for equal pixels of equal size."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=b"%dx%d" % image.size).digest()


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [SIDE, SIDE, 3]."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def near_groups_by_class(thumbnails: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """near_groups within each class: objects photographed alike, as traffic signs are, must not join through another class. labels: [N]."""
    groups = np.arange(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        groups[members] = members[near_groups(thumbnails[members])]
    return groups


def repeated(thumbnails: NDArray[np.uint8], labels: NDArray[np.int64], others: NDArray[np.uint8], other_labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images are, exactly or nearly, among others of their class; bool [N]. thumbnails: [N, SIDE, SIDE, 3], others: [M, SIDE, SIDE, 3]."""
    groups = near_groups_by_class(np.concatenate((thumbnails, others)), np.concatenate((labels, other_labels)))
    return np.isin(groups[: len(labels)], groups[len(labels) :])


def near_groups(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """uint8 [N, SIDE, SIDE, 3] -> int64 [N], equal for images joined by a chain of near duplicates; the smallest index of each group.

    The time is that of an N x N product of 192 columns, and the memory that of a block of rows, however many pairs there are.
    """
    n, step = len(thumbnails), SIDE // COARSE
    coarse = np.empty((n, COARSE, COARSE, 3), np.float32)
    fine = np.empty((n, SIDE * SIDE * 3), np.float16)  # a third decimal is enough, and half the memory
    for start in range(0, n, 1024):
        values = thumbnails[start : start + 1024].astype(np.float32)
        coarse[start : start + 1024] = values.reshape(-1, COARSE, step, COARSE, step, 3).mean((2, 4))
        fine[start : start + 1024] = _unit(values - values.mean((1, 2), keepdims=True)).reshape(len(values), -1)
    even, odd = _folded(_unit(coarse - coarse.mean((1, 2, 3), keepdims=True)))
    groups = np.arange(n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        # even + odd is the correlation with an image and even - odd that with its mirror image: the larger of the two.
        likeness = np.abs(odd[start:stop] @ odd[:stop].T)
        likeness += even[start:stop] @ even[:stop].T
        hits = likeness >= COARSE_MATCH
        for i in range(start, stop):
            near = np.flatnonzero(hits[i - start, :i])
            near = near[groups[near] != groups[i]]
            if len(near) > _CANDIDATES:
                near = near[np.argpartition(likeness[i - start, near], -_CANDIDATES)[-_CANDIDATES:]]
            if len(near):
                near = near[_fine_match(fine[i], fine[near])]
            joined = np.unique(groups[near])
            if len(joined):
                groups[np.isin(groups, [*joined, groups[i]])] = joined[0]
    return groups


def _unit(values: Float) -> Float:
    """Each row scaled to length one, or shorter where it has too little contrast to be compared."""
    flat = values.reshape(len(values), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    scaled: Float = (flat / np.maximum(length, MIN_CONTRAST * flat.shape[1] ** 0.5)).reshape(values.shape)
    return scaled


def _folded(units: Float) -> tuple[Float, Float]:
    """The mirror-even and mirror-odd halves of [N, S, S, 3], each [N, S * S/2 * 3]; dot products add up to that of the whole."""
    left, right = units[:, :, : COARSE // 2], units[:, :, : COARSE // 2 - 1 : -1]
    root2 = np.float32(2**0.5)
    return ((left + right) / root2).reshape(len(units), -1), ((left - right) / root2).reshape(len(units), -1)


def _fine_match(one: NDArray[np.float16], others: NDArray[np.float16]) -> NDArray[np.bool_]:
    image, block = one.astype(np.float32), others.astype(np.float32)
    mirror = image.reshape(SIDE, SIDE, 3)[:, ::-1].ravel()
    matches: NDArray[np.bool_] = np.maximum(block @ image, block @ mirror) >= FINE_MATCH
    return matches
