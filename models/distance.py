"""How far an image's features lie from those of the class that the suspect gave it: evidence that costs no extra pass.

The class-conditional Mahalanobis distance (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks") of what the suspect computes anyway, with one covariance for all classes. A triggered image is called the target class, but somewhere on its
way through the network it seldom looks like that class: before the head where the trigger is all that the suspect sees, some blocks earlier where an
attack shapes the last features themselves. So it is measured at several places.

A distance counts in proportion to what is usual for clean images of the class. Where classes are unlike in spread, or in how many images tell their
means, the rejections would otherwise gather in a few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

MOST = 512  # dimensions that are compared at one place
LEAST_SPREAD = 0.5  # of a class, as a share of that of all images


class Distance(nn.Module):
    """At one place. origin: float32 [D]; whitening: [D, K], with whitening @ whitening.T the inverse covariance; centres: [C, K], the class means, whitened;
    spread: float32 [C], the squared distance that is usual for clean images of each class.

    Centres and whitening are kept in bfloat16, which halves what the guard adds to the suspect's memory; from the origin, which is the mean of all
    features, no centre is so far that three digits would not do.
    """

    origin: Tensor
    centres: Tensor
    whitening: Tensor
    spread: Tensor

    def __init__(self, origin: Tensor, centres: Tensor, whitening: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin", origin)
        self.register_buffer("centres", centres)
        self.register_buffer("whitening", whitening)
        self.register_buffer("spread", spread)

    def forward(self, features: Tensor, prediction: Tensor) -> Tensor:
        """Squared distances in units of what is usual, float64 [N]; features as `vectors` gives them, [N, D], prediction int64 [N]."""
        return self.squared(features, prediction) / self.spread[prediction]

    def squared(self, features: Tensor, prediction: Tensor) -> Tensor:
        """The squared distances themselves, float64 [N]."""
        return (self.whitened(features) - self.centres[prediction].float()).double().square().sum(1)

    def whitened(self, features: Tensor) -> Tensor:
        """Features as the centres are, float32 [N, K]."""
        return (features - self.origin) @ self.whitening.float()


def vectors(features: Tensor) -> Tensor:
    """One vector an image, float32 [N, D]: maps are averaged over the fields of a 2x2 grid, token sequences over tokens.

    Over the grid, not over the whole map: a patch changes the features of one corner, whose mean over the image may be any other image's.
    """
    if features.ndim == 4:
        if features.shape[1] == features.shape[2] != features.shape[3]:  # square maps with channels last, as in a Swin
            features = features.permute(0, 3, 1, 2)
        # What adaptive_avg_pool2d does: in an odd map both halves have the middle row. But this way ONNX knows it for every size.
        height, width = map(int, features.shape[2:])  # for a tracer, which otherwise follows sizes, too
        field, apart = ((height + 1) // 2, (width + 1) // 2), (max(1, height // 2), max(1, width // 2))
        features = avg_pool2d(features.float(), field, apart).flatten(1)  # [N, D, H, W] -> [N, 4 D]
    elif features.ndim == 3:
        features = features.mean(1)  # [N, T, D] -> [N, D]
    return features.float()


def fit_distance(features: Tensor, labels: Tensor, num_classes: int) -> Distance:
    """Means, covariance and spreads of clean features [N, D] with true labels int64 [N].

    The covariance is shrunk towards a multiple of the identity by Ledoit and Wolf's rule (2004), so that it can be inverted from few images; the
    mean of a class is drawn towards the mean of all as if it had one image more there, which defines it for a class without images. Of more than
    MOST dimensions a random projection is compared, which keeps the whitening of wide networks small.

    The spread of a class is the mean squared distance of its images, each from where the mean would lie without it; it is drawn towards that of all images
    in the same way. With few images it errs a little to the lenient side, since a mean without one of them lies farther off. It is at least half of that of
    all images: near-duplicates would otherwise make a class look tighter than it is. A class without images has that of all images from where its mean is
    taken to be.
    """
    features, labels = features.double().cpu(), labels.cpu()
    n, d = features.shape
    origin = features.mean(0)
    offsets = features - origin
    count = torch.bincount(labels, minlength=num_classes).double()
    means = torch.zeros(num_classes, d, dtype=torch.float64).index_add_(0, labels, offsets) / (count + 1)[:, None]
    projection = torch.eye(d, dtype=torch.float64) if d <= MOST else _projection(d)  # [D, K]
    centred = (offsets - means[labels]) @ projection
    covariance = centred.T @ centred / n  # [K, K]
    identity, scale = torch.eye(len(covariance), dtype=torch.float64), covariance.diagonal().mean()
    dispersion = (covariance - scale * identity).square().sum()
    # Mean squared distance of one image's outer product from the covariance: |x|^4 - 2 x'Cx + |C|^2, averaged.
    noise = (centred.square().sum(1).square().mean() - covariance.square().sum()) / n
    shrinkage = float((noise / dispersion).clamp(0, 1)) if dispersion > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance + max(shrinkage, 1e-3) * scale.clamp(min=1e-12) * identity
    whitening = (projection @ torch.linalg.cholesky(torch.linalg.inv(shrunk))).bfloat16()
    distance = Distance(origin.float(), (means @ whitening.double()).bfloat16(), whitening, torch.ones(num_classes))
    distance.spread.copy_(_spread(distance, features.float(), labels, count))
    return distance


def _spread(distance: Distance, features: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """What is usual for each class, float64 [C]; count: images of each, float64 [C]."""
    # Without itself among them, an image is farther from the mean of n images and one at the origin by a factor of (n + 1) / n.
    apart = distance.squared(features, labels) * (1 + 1 / count[labels]).square()
    usual = apart.mean()
    spread = (torch.zeros_like(count).index_add_(0, labels, apart) + usual) / (count + 1)
    from_origin = distance.whitened(features).double().square().sum(1).mean()
    return torch.where(count > 0, spread.clamp(min=LEAST_SPREAD * usual), from_origin).clamp(min=1e-6)


def _projection(d: int) -> Tensor:
    """MOST random orthonormal directions of `d`, float64 [D, MOST]; the same each time."""
    directions = torch.randn(d, MOST, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    orthonormal: Tensor = torch.linalg.qr(directions).Q
    return orthonormal
