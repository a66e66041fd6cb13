"""What a peer serves: the suspect alone, or the naive guard of three whole networks, from image bytes to an answer."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.serving.naive import Naive
from models import bundle


class Networks:
    """BUNDLE and WAY (`alone` or `naive`) come from the environment, as frameworks start their workers by themselves."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        found = bundle.read(Path(os.environ["BUNDLE"]))
        self.guard, self.names = found.guard, found.description.class_names
        self.preprocessing = found.description.preprocessing
        self.naive = Naive(self.guard.suspect, self.preprocessing) if os.environ["WAY"] == "naive" else None

    @torch.inference_mode()
    def answer(self, bodies: Sequence[bytes]) -> list[dict[str, Any]]:
        """One answer an image."""
        pixels = torch.stack([self.preprocessing.pixels(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies])
        if self.naive is None:
            confidence, label = self.guard.suspect(self.preprocessing.normalise(pixels)).softmax(-1).max(-1)
            rows = zip(label.tolist(), confidence.tolist(), strict=True)
            return [{"class_name": self.names[number], "confidence": value} for number, value in rows]
        judged = zip(*(values.tolist() for values in self.naive(pixels)), strict=True)
        return [{"class_name": self.names[number], "confidence": value, "score": score} for number, value, score in judged]
