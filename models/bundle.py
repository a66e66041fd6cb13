"""One version of a guard on disk: write, verify, read.

A bundle is a folder of safetensors files and reports around `manifest.json`. The manifest's `content` says everything that decides a verdict,
down to the SHA-256 of each weight file by its role; `bundle_id` is the hash of `content`. What differs between two runs of the same calibration
(times, host) stands apart in `record`. Reading hashes the very bytes that are then used, and refuses a bundle with anything missing,
changed or added. Bundles are never changed once written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from models import architectures, trunk
from models.distance import Distance
from models.durable import sync_folder, write_file
from models.errors import BundleNotReady, ConfigInvalid
from models.guard import Cuts, Fusion, Guard, Scales
from models.lowering import folded, halved
from models.preprocessing import Preprocessing
from models.score import Scale
from models.threshold import ROUNDING, Threshold

CPU = torch.device("cpu")
SCHEMA = 6
# The first knew no architecture_options, and no preprocessing with another aspect; the second one distance, and no gate; the third no images to check with;
# the fourth distances without a spread of each class; the fifth did not compare the auxiliary with the suspect.
READABLE = (1, 2, 3, 4, 5, SCHEMA)
_WEIGHTS = ("suspect", "experts", "auxiliary", "distance", "validation")
_REPORTS = ("report.json", "report.html")


@dataclass(frozen=True)
class Description:
    """What a bundle is, without its weights."""

    architecture: str  # a full name
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    preset: str
    seed: int
    cuts: Cuts | None
    experts: int
    c: float
    scales: Scales | None  # of the fused score; None for the published one
    threshold: Threshold
    architecture_options: dict[str, Any] = field(default_factory=dict)  # what the network is built from beside its name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Description:
        threshold = Threshold(**{**value["threshold"], "interval": tuple(value["threshold"]["interval"])})
        preprocessing = Preprocessing.from_json(value["preprocessing"])
        cuts = None if value["cuts"] is None else Cuts(value["cuts"]["experts"], tuple(value["cuts"]["places"]))
        scales = None if value["scales"] is None else _scales(**value["scales"])
        parsed = {"class_names": tuple(value["class_names"]), "preprocessing": preprocessing, "cuts": cuts, "scales": scales, "threshold": threshold}
        return cls(**{**value, **parsed})


NEAREST, MOST_NEAREST = 16, 64  # validation images that are kept on either side of the threshold, at least and at most


@dataclass(frozen=True)
class Reference:
    """Validation images whose scores lie nearest the threshold, and these scores: what a guard has to repeat wherever it is served."""

    pixels: Tensor  # uint8 [M, 3, size, size]
    scores: Tensor  # float64 [M]


def nearest(pixels: Tensor, scores: Tensor, threshold: Threshold) -> Reference:
    """Of the validation images, uint8 [n, 3, size, size], with their scores, float64 [n]."""
    below, above = _spare(threshold)
    kept = min(MOST_NEAREST, max(NEAREST, below + 1, above + 1))  # one more than may change sides, or it could not be seen
    chosen = scores.argsort()[max(0, threshold.rank - 1 - kept) : threshold.rank - 1 + kept]
    return Reference(pixels[chosen.to(pixels.device)].cpu(), scores[chosen])


def _spare(threshold: Threshold) -> tuple[int, int]:
    """How many validation images fewer, and how many more, may be rejected with the share still within the promised interval.

    One fewer than the rank are rejected of the validation images themselves; with a rank of 1 that is none.
    """
    low, high = threshold.interval
    rejected, least, most = threshold.rank - 1, math.ceil(low * threshold.n - 1e-9), math.floor(high * threshold.n + 1e-9)
    return max(0, rejected - least), max(1, most - rejected)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory."""

    bundle_id: str
    description: Description
    guard: Guard
    validation_scores: Tensor  # float64 [n], ascending: other target FPRs can be promised from them
    reference: Reference | None  # None in bundles of an older schema
    record: dict[str, Any] = field(default_factory=dict)


def write(
    folder: Path,
    description: Description,
    guard: Guard,
    validation_scores: Tensor,
    record: dict[str, Any],
    reports: dict[str, str],
    reference: Reference | None = None,
) -> str:
    """Write a bundle into an existing, empty folder and return its id. Every file is flushed before the manifest names it."""
    weights: dict[str, dict[str, Tensor]] = {
        "suspect": guard.suspect.state_dict(),
        "experts": guard.experts.state_dict(),  # keys "0.<key>", "1.<key>", ...
        "auxiliary": guard.auxiliary.state_dict(),
        "distance": guard.distances.state_dict(),  # keys "0.centres", "0.whitening", ...
        "validation": {
            "scores": validation_scores.sort().values,
            **({} if reference is None else {"nearest": reference.pixels, "nearest_scores": reference.scores}),
        },
    }
    hashes = {}
    for role in _WEIGHTS:
        plain = {key: value.detach().cpu().contiguous() for key, value in sorted(weights[role].items())}
        data = safetensors.torch.save(plain)
        write_file(folder / f"{role}.safetensors", data)
        hashes[role] = hashlib.sha256(data).hexdigest()
    for name in _REPORTS:
        write_file(folder / name, reports[name].encode())
    content = {"schema": SCHEMA, **description.to_json(), "sha256": hashes}
    manifest = {"bundle_id": _hash(content), "content": content, "record": record}
    write_file(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode())
    sync_folder(folder)
    return _hash(content)


def describe(folder: Path) -> tuple[str, Description, dict[str, Any]]:
    """(bundle_id, description, record) after checking the manifest alone, not the weights. Raises BundleNotReady."""
    content, manifest = _manifest(folder)
    return manifest["bundle_id"], _description(content), manifest["record"]


def read(folder: Path, device: torch.device = CPU) -> Bundle:
    """Verify and load a bundle onto the CPU, in the precision that suits `device`. Raises BundleNotReady, naming the file that is wrong.

    Weights that were kept in bfloat16 stay in it, and compute in it where the device is fast at that, in float32 elsewhere.
    """
    content, manifest = _manifest(folder)
    try:
        found = {path.name for path in folder.iterdir()}
    except OSError as error:  # another server may remove it at this moment
        raise BundleNotReady(f"The bundle's folder cannot be read ({error.strerror}).") from error
    wanted = {"manifest.json", *_REPORTS, *(f"{role}.safetensors" for role in _WEIGHTS)}
    if found != wanted:
        raise BundleNotReady(f"The bundle's files differ from its manifest: {', '.join(sorted(found ^ wanted)[:5])}.")
    description = _description(content)
    tensors = {role: _weights(folder, role, content["sha256"].get(role)) for role in _WEIGHTS}
    try:
        architecture = architectures.get(description.architecture, description.architecture_options)
        suspect = architectures.instantiate(architecture, description.num_classes, tensors["suspect"])
        auxiliary = _into(copy.deepcopy(suspect), tensors["auxiliary"], device)
        experts = []
        for index in range(description.experts):
            expert = trunk.tail_copy(suspect, None if description.cuts is None else description.cuts.experts)
            prefix = f"{index}."
            own = {key[len(prefix) :]: value for key, value in tensors["experts"].items() if key.startswith(prefix)}
            experts.append(_into(expert, own, device))
        fusion = None
        if description.scales is not None:
            fusion = Fusion(_distances(tensors["distance"], len(description.scales.distances)), description.scales)
        guard = Guard(suspect, experts, auxiliary, description.preprocessing, cuts=description.cuts, fusion=fusion, c=description.c)
        kept = tensors["validation"]
        reference = Reference(kept["nearest"], kept["nearest_scores"]) if "nearest" in kept else None
        return Bundle(manifest["bundle_id"], description, guard, kept["scores"], reference, manifest["record"])
    except ConfigInvalid as problem:
        name = description.architecture
        raise BundleNotReady(
            f"The bundle's architecture, {name}, cannot be had here; BADEXPERT_ARCHITECTURES names those of your own. {problem.detail}"
        ) from problem
    except trunk.CannotCut as error:  # whoever traced it at its calibration could: its code, or a library, is another since
        raise BundleNotReady(f"The bundle's architecture, {description.architecture}, cannot be taken apart here as at its calibration. {error}") from error
    except (KeyError, RuntimeError) as error:
        raise BundleNotReady("The bundle's weights do not fit the networks that its manifest names.") from error


def check(found: Bundle) -> None:
    """Whether the guard, on the device where it is now, still keeps the promise of its calibration. Raises BundleNotReady.

    Another device or precision moves scores a little. As many of the reference images may change sides as leave the share of rejected validation images
    within the promised interval, but not all that are kept on a side: then nobody knows how many more did.
    """
    if found.reference is None:
        return
    threshold, now = found.description.threshold, found.guard.judge(found.reference.pixels).score
    rejected, before = (int(threshold.rejects(scores).sum()) for scores in (now, found.reference.scores))
    below, above = _spare(threshold)
    finite, moved = bool(now.isfinite().all()), rejected - before
    if not finite or moved > min(above, len(now) - before - 1) or (-moved > below) or (moved and rejected == 0 and before >= NEAREST):
        what = f"rejects {rejected} of {len(now)} stored validation images, where its calibration rejected {before}" if finite else "computes what is no number"
        raise BundleNotReady(
            f"On this device the guard {what}: it does not keep its promise of {threshold.target_fpr:g} here. Calibrate again on a device of this kind."
        )


def repeats_verdicts(found: Bundle, served: nn.Module) -> bool:
    """Whether what serves instead of the guard, on the same device, decides about the reference images as the guard does.

    But for those whose scores rounding may move over the threshold: in older bundles it is the very score of one of them.
    """
    if found.reference is None:
        return True
    device, threshold, scores = next(found.guard.parameters()).device, found.description.threshold, found.guard.judge(found.reference.pixels).score
    now = torch.cat([threshold.rejects(served(part.to(device)).score) for part in found.reference.pixels.split(8)]).cpu()
    near = (scores - threshold.value).abs() <= ROUNDING * (1 + abs(threshold.value))
    return torch.equal(now[~near], threshold.rejects(scores)[~near])


def _into(network: nn.Module, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Weights into a network of the suspect's shape, which becomes what they were lowered to. Raises RuntimeError where they do not fit."""
    if network.state_dict().keys() != weights.keys():
        network = folded(network)
    if any(value.dtype == torch.bfloat16 for value in weights.values()):
        network = halved(network, device)
    network.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last)


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        content = manifest["content"]
        if content["schema"] not in READABLE:
            raise BundleNotReady(f"The bundle has schema {content['schema']}; this version of the guard reads {' and '.join(map(str, READABLE))}.")
        if _hash(content) != manifest["bundle_id"]:
            raise BundleNotReady("The bundle's manifest was changed after it was written.")
        return content, manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleNotReady("The bundle's manifest is missing or damaged.") from error


def _scales(
    expert: dict[str, float], distances: list[dict[str, float]], auxiliary: dict[str, float], shortfall: dict[str, float] | None, gate: float
) -> Scales:
    compared = None if shortfall is None else Scale(**shortfall)
    return Scales(Scale(**expert), tuple(Scale(**scale) for scale in distances), Scale(**auxiliary), compared, gate)


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of an older schema as the present one has it: one place, a gate that every image passes, and no shortfall judge as they did then."""
    if content["schema"] < 3:
        if content["cuts"] is not None:
            content = {**content, "cuts": {"experts": content["cuts"]["experts"], "places": [content["cuts"]["features"]]}}
        if content["scales"] is not None:
            expert, auxiliary, distance = content["scales"]
            content = {**content, "scales": {"expert": expert, "distances": [distance], "auxiliary": auxiliary, "gate": 0.0}}
    if content["schema"] < 6 and content["scales"] is not None:
        content = {**content, "scales": {**content["scales"], "shortfall": None}}
    return content


def _distances(kept: dict[str, Tensor], count: int) -> list[Distance]:
    if "means" in kept:  # of schema 1 or 2
        kept = {"0.centres": kept["means"] @ kept["whitening"], "0.whitening": kept["whitening"]}
    found = []
    for place in range(count):
        centres, whitening = kept[f"{place}.centres"], kept[f"{place}.whitening"]
        origin = kept.get(f"{place}.origin", torch.zeros(len(whitening)))  # schema 3 had none
        spread = kept.get(f"{place}.spread", torch.ones(len(centres)))  # nor had schema 4
        found.append(Distance(origin, centres, whitening, spread))
    return found


def _description(content: dict[str, Any]) -> Description:
    try:
        content = _upgraded(content)
        return Description.from_json({key: value for key, value in content.items() if key not in ("schema", "sha256")})
    except (KeyError, TypeError, ValueError) as error:
        raise BundleNotReady("The bundle's manifest lacks something.") from error


def _weights(folder: Path, role: str, sha256: str | None) -> dict[str, Tensor]:
    name = f"{role}.safetensors"
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise BundleNotReady(f"{name} in the bundle is not a regular file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleNotReady(f"{name} in the bundle cannot be read.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleNotReady(f"{name} in the bundle was changed after it was written.")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise BundleNotReady(f"{name} in the bundle is damaged.") from error


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
