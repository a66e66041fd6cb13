"""TED (Mo et al. 2024, "Robust Backdoor Detection for Deep Learning via Topological Evolution Dynamics").

In each layer an image's nearest neighbours among clean images are sorted; its rank there is the place of the first that the suspect gives the same class. A
clean image is close to its class all the way, a triggered one only at the end. The ranks of all layers together go to a PCA outlier detector.

Unlike in the authors' code a layer is a block of the network, maps are averaged over 4x4 fields, and the reference images are all of the clean ones. Taken
flat, of those that the suspect gets right, behind blocks or behind each convolution, BadNet came out at an AUROC of 0.67 and 0.80 instead of 0.90.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from benchmarks.detectors.layers import Layers, vectors
from calibration.finetune import LabelledPixels


class Ted(Detector):
    """Minus the outlier score of the ranks: squared distances along the principal axes, each over its variance."""

    name, title, paper = "ted", "TED", "Mo et al. 2024"
    passes = 1  # and the distances to the reference images in every layer

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.layers = Layers(suspect, clean.pixels[:1])
        seen = list(self.layers(clean.pixels))
        self.references = [torch.cat([vectors(layers[i]) for layers, _ in seen]) for i in range(len(seen[0][0]))]  # [R, D] a layer
        self.classes = torch.cat([prediction for _, prediction in seen])
        ranks = self.ranks(clean.pixels, among_themselves=True)
        self.mean, self.std = ranks.mean(0), ranks.std(0).clamp_min(1 / len(clean))  # one rank
        standard = (ranks - self.mean) / self.std
        variances, self.axes = torch.linalg.eigh(standard.T @ standard / len(standard))
        self.variances = variances.clamp_min(1e-3 * variances.max().item())
        return {"layers": len(self.references), "references": len(clean)}

    def ranks(self, pixels: Tensor, among_themselves: bool = False) -> Tensor:
        """float64 [N, layers] in [0, 1]: 0 where the nearest reference has the image's class, 1 where none has.

        among_themselves: the images are the references, in their order, and none counts as its own neighbour.
        """
        found = list[Tensor]()
        for layers, prediction in self.layers(pixels):
            same = self.classes == prediction[:, None]  # [n, R]
            own = torch.arange(len(same), device=same.device) + sum(map(len, found))
            of_layers = []
            for value, reference in zip(layers, self.references, strict=True):
                distances = torch.cdist(vectors(value), reference)
                if among_themselves:
                    distances[torch.arange(len(own), device=own.device), own] = torch.inf
                nearest = distances.masked_fill(~same, torch.inf).amin(1, keepdim=True)
                of_layers.append((distances < nearest).double().mean(1))
            found.append(torch.stack(of_layers, 1).cpu())
        return torch.cat(found)

    def score(self, pixels: Tensor) -> Tensor:
        along = ((self.ranks(pixels) - self.mean) / self.std) @ self.axes
        found: Tensor = -(along.square() / self.variances).sum(1)
        return found
