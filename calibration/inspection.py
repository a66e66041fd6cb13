"""What a checkpoint is, without calibrating anything: format, architecture, classes, and with clean images its preprocessing and accuracy."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from calibration.clean_set import open_clean_set
from calibration.config import InspectionConfig
from calibration.suspect import Suspect, by_name, contradictions, doubts, doubts_on_images, named_classes, read_suspect, understand
from models.checkpoint import read_checkpoint
from models.durable import write_file


def inspect(config: InspectionConfig, checkpoint: Path, clean_set: Path | None, device: torch.device) -> dict[str, Any]:
    """The findings as JSON. Raises a Problem where a file cannot be used at all; whatever else is wrong is among the `warnings`."""
    suspect = read_suspect(checkpoint, config.architecture, config.num_classes, device)
    if clean_set is None:
        return {
            **_describe(suspect),
            "clean_set": None,
            "accuracy": None,
            "warnings": [caution.to_json() for caution in doubts(suspect)],
        }
    found = open_clean_set(clean_set)
    clean = found.labelled_by(suspect.num_classes, named_classes(config.classes, suspect, found))
    understood = understand(suspect, clean, np.arange(len(clean)), device, config.seed)
    suspect, finding, best = understood.suspect, understood.finding, understood.finding.best
    described = _describe(suspect)
    return {
        **described,
        "classes": list(clean.names),
        "preprocessing": best.preprocessing.to_json(),
        "preprocessing_text": str(best.preprocessing),
        "preprocessing_from": "clean set",
        "accuracy": best.accuracy,
        "accuracy_images": finding.images,
        "preprocessing_clear": finding.clear,
        "candidates": [{**asdict(candidate), "preprocessing": candidate.preprocessing.to_json()} for candidate in finding.candidates],
        "class_order": None if understood.reordering is None else asdict(understood.reordering),
        "contradictions": by_name(contradictions(understood, clean).contradictions, clean),
        "clean_set": {"source": clean.source, "images": len(clean), "classes": len(set(clean.labels.tolist())), "groups": len(set(clean.groups.tolist()))},
        "notes": [*described["notes"], *finding.notes],
        "warnings": [caution.to_json() for caution in doubts_on_images(understood, clean)] + [{"code": "clean-set", "detail": text} for text in clean.warnings],
    }


def convert(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the tensors of a checkpoint, bit for bit and with wrapper prefixes gone, as safetensors. Raises a Problem."""
    read = read_checkpoint(checkpoint)
    plain = {name: tensor.contiguous().clone() for name, tensor in read.tensors.items()}  # apart: safetensors writes no shared memory
    write_file(out, safetensors.torch.save(plain))
    return {"tensors": len(plain), "bytes": out.stat().st_size, "notes": list(read.notes)}


def _describe(suspect: Suspect) -> dict[str, Any]:
    checkpoint, tensors = suspect.checkpoint, suspect.checkpoint.tensors
    sidecar = checkpoint.sidecar
    claimed = None if sidecar is None else sidecar.preprocessing
    return {
        "format": checkpoint.format,
        "made_by": None if sidecar is None else sidecar.kind,
        "source": checkpoint.source or None,
        "architecture": suspect.architecture.short_name,
        "library": suspect.architecture.library,
        "options": dict(suspect.architecture.options),
        "equivalent": list(suspect.match.equivalent),
        "num_classes": suspect.num_classes,
        "classes": None if suspect.classes is None else list(suspect.classes),
        "tensors": len(tensors),
        "parameters": sum(parameter.numel() for parameter in suspect.network.parameters()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "preprocessing": None if claimed is None else claimed.to_json(),
        "preprocessing_text": None if claimed is None else str(claimed),
        "preprocessing_from": None if claimed is None else "config.json",
        "notes": [*checkpoint.notes, *suspect.notes],
    }
