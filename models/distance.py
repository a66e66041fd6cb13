"""How far an image's features lie from those of the class that the suspect gave it: evidence that costs no extra pass.

The class-conditional Mahalanobis distance (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks") of the suspect's own penultimate features, with one covariance for all classes. A triggered image is called the target class, but its
features seldom look like that class's. It is blind where an attack shapes the features themselves, and strong where the experts are weak.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Distance(nn.Module):
    """means: float32 [C, D], one for each class; whitening: float32 [D, D], with whitening @ whitening.T the inverse covariance."""

    means: Tensor
    whitening: Tensor

    def __init__(self, means: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("whitening", whitening)

    def forward(self, features: Tensor, prediction: Tensor) -> Tensor:
        """Squared distances, float64 [N]; features as `penultimate` gives them, [N, D], prediction int64 [N]."""
        return ((features - self.means[prediction]) @ self.whitening).double().square().sum(1)


def penultimate(features: Tensor) -> Tensor:
    """What stands before the head as one vector an image: maps are averaged over space, token sequences over tokens; float32 [N, D]."""
    if features.ndim == 4:
        features = features.mean((2, 3))  # [N, D, H, W] -> [N, D]
    elif features.ndim == 3:
        features = features.mean(1)  # [N, T, D] -> [N, D]
    return features.float()


def fit_distance(features: Tensor, labels: Tensor, num_classes: int) -> Distance:
    """Means and covariance of clean features [N, D] with true labels int64 [N].

    The covariance is shrunk towards a multiple of the identity by Ledoit and Wolf's rule (2004), so that it can be inverted from few images; the
    mean of a class is drawn towards the mean of all as if it had one image more there, which defines it for a class without images.
    """
    features, labels = features.double().cpu(), labels.cpu()
    n, d = features.shape
    totals = torch.zeros(num_classes, d, dtype=torch.float64).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=num_classes).double()[:, None]
    means = (totals + features.mean(0)) / (counts + 1)
    centred = features - means[labels]
    covariance = centred.T @ centred / n  # [D, D]
    scale = covariance.diagonal().mean()
    spread = (covariance - scale * torch.eye(d, dtype=torch.float64)).square().sum()
    # Mean squared distance of one image's outer product from the covariance: |x|^4 - 2 x'Cx + |C|^2, averaged.
    noise = (centred.square().sum(1).square().mean() - covariance.square().sum()) / n
    shrinkage = float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0
    shrunk = (1 - shrinkage) * covariance + max(shrinkage, 1e-3) * scale.clamp(min=1e-12) * torch.eye(d, dtype=torch.float64)
    whitening = torch.linalg.cholesky(torch.linalg.inv(shrunk))
    return Distance(means.float(), whitening.float())
