"""The clean set as the calibration sees it: labelled images, decoded on demand, and which of them must not be split apart.

Owns the mapping from the class names that were found to the classes of the suspect. Refuses labels that do not fit them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.clean_set.container import listed
from calibration.clean_set.duplicates import repeated
from calibration.clean_set.layout import is_integer
from models.errors import CleanSetLabels, CleanSetProblem

ONE_CLASS_HOLDS_MOST = 0.8


class Images(Protocol):
    """Where the pixels are. `image` gives RGB, or raises CleanSetInvalid naming the member; safe to call from several threads."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def image(self, index: int) -> Image.Image: ...


@contextmanager
def named(kind: str) -> Iterator[None]:
    """Within the block a problem with a clean set tells which one it is about."""
    try:
        yield
    except CleanSetProblem as problem:
        raise type(problem)(f"In the {kind}: {problem.detail}") from problem


@dataclass(frozen=True)
class CleanSet:
    """N labelled clean images.

    names: distinct class names as found, sorted (numerically where all are integers), or in the order that the container itself declares;
    after `labelled_by`, one name for each class of the suspect.
    labels: int64 [N], indices into names. groups: int64 [N], equal for exact and near duplicates: keep a group on one side of every split.
    thumbnails: uint8 [N, SIDE, SIDE, 3], by which another set's images are known again; digests: N of them, equal for equal images.
    warnings: what was forgiven, in plain sentences.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    source: str
    warnings: tuple[str, ...]
    groups: NDArray[np.int64]
    thumbnails: NDArray[np.uint8] = field(repr=False)
    digests: tuple[bytes, ...] = field(repr=False)
    _images: Images = field(repr=False)
    _members: NDArray[np.int64] = field(repr=False)  # [N], indices into _images
    _ordered: bool = False  # the container declares the order of the classes

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image in RGB, read and decoded now."""
        return self._images.image(int(self._members[i]))

    def name(self, i: int) -> str:
        """What the i-th image is called where it came from, in plain characters."""
        return self._images.name(int(self._members[i]))

    def images(self, indices: Iterable[int] | None = None) -> Iterator[Image.Image]:
        """The images of these indices, or all, in order, one in memory at a time."""
        return (self.image(i) for i in (range(len(self)) if indices is None else indices))

    def rows_not_in(self, other: CleanSet) -> NDArray[np.int64]:
        """Of which images `other`, labelled by the same suspect, has none that is the same, exactly or nearly."""
        theirs = set(other.digests)
        same = np.array([digest in theirs for digest in self.digests], bool)  # whatever class they are shown as, and however flat they are
        return np.flatnonzero(~(same | repeated(self.thumbnails, self.labels, other.thumbnails, other.labels)))

    def labelled_by(self, num_classes: int, classes: Sequence[str] | None = None, least_classes: int = 2) -> CleanSet:
        """The same images with labels that are class indices of the suspect. Raises CleanSetLabels where they cannot be.

        With `classes`, names are looked up there. Otherwise integers are class indices, and other names stand for 0, 1, ... in their order.
        least_classes: with images of fewer, it is refused.
        """
        warnings = list(self.warnings)
        if classes is not None and (len(classes) != num_classes or len(set(classes)) != len(classes)):
            raise CleanSetLabels(f"classes must name each of the suspect's {num_classes} classes once; it has {len(set(classes))} names.")
        integers = not self._ordered and all(is_integer(name) for name in self.names)
        if classes is not None and not (integers and not set(self.names) & set(classes)):
            targets, names = self._by_name(classes), tuple(classes)
        elif integers:
            targets = self._by_number(num_classes)
            names = tuple(classes) if classes is not None else tuple(str(i) for i in range(num_classes))
            if self.source.endswith("ImageFolder") and list(self.names) != sorted(self.names):
                warnings.append(
                    "The class folders are numbers and were taken as class indices; a suspect trained on folders sorted as text "
                    "(1, 10, 2) has another order: pass classes for it."
                )
        elif len(self.names) != num_classes:
            few = len(self.names) < num_classes
            what = "pass classes, the suspect's class names in order, if some are missing here" if few else "leave out images of classes that it does not know"
            raise CleanSetLabels(f"The clean set has {len(self.names):,} classes and the suspect {num_classes:,}; {what}.")
        else:
            targets, names = list(range(num_classes)), self.names
        labels = np.array(targets, np.int64)[self.labels]
        counts = np.bincount(labels, minlength=num_classes)
        if np.count_nonzero(counts) < least_classes:
            raise CleanSetLabels("All images of the clean set belong to one class; at least two are needed.")
        absent = [names[i] for i in np.flatnonzero(counts == 0)]
        if absent:
            warnings.append(
                f"{len(absent):,} of {num_classes:,} classes have no images: {listed(absent)}. Much of what the suspect takes for one of them will be rejected."
            )
        if counts.max() > ONE_CLASS_HOLDS_MOST * len(labels):
            warnings.append(f"{counts.max() / len(labels):.0%} of the images belong to one class, {listed([names[int(counts.argmax())]])}.")
        return replace(self, names=names, labels=labels, warnings=tuple(warnings))

    def _by_name(self, classes: Sequence[str]) -> list[int]:
        index = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in self.names if name not in index]
        if unknown:
            raise CleanSetLabels(f"The suspect has no classes {listed(unknown)}, which the clean set has; it knows {listed(classes)}.")
        return [index[name] for name in self.names]

    def _by_number(self, num_classes: int) -> list[int]:
        numbers = [int(name) for name in self.names]
        if max(numbers) >= num_classes:
            raise CleanSetLabels(
                f"The clean set has label {max(numbers)}, but the suspect's {num_classes:,} classes are 0 to {num_classes - 1}; "
                "pass classes if its labels are names."
            )
        if len(set(numbers)) < len(numbers):
            raise CleanSetLabels("Two classes of the clean set are the same number, written differently.")
        return numbers
