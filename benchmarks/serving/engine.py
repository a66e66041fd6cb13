"""The price of the guard without any HTTP: `python -m benchmarks.serving.engine`.

Side by side in one process, turn by turn: the suspect alone, as it came and as we would serve it; our guard on clean traffic, and where every image reaches
the gate (an attacker who sends nothing else); and the naive guard of three whole networks. Then, of fewer batch sizes, the guard where a share of the traffic
is attacked, and two other detectors that judge single images. The bundle of resnet20 is a real one, of a suspect of the zoo, and
what it catches is told beside its price; the other architectures have random weights, whose work is the same. `--record` writes
benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.data import DATASETS, test_images
from benchmarks.detectors.guard import BadExpertGuard
from benchmarks.detectors.interface import Observed
from benchmarks.detectors.scale_up import ScaleUp
from benchmarks.detectors.strip import Strip
from benchmarks.evaluate import evaluate
from benchmarks.serving.naive import Naive
from benchmarks.zoo import Entry, load
from calibration.finetune import LabelledPixels
from calibration.fusion import fit_distances, fuse, lower
from calibration.recipes import auto_recipe
from calibration.workshop import choose_cuts
from models import architectures
from models.cuda_graphs import Recorded, Recorder
from models.guard import Guard
from models.lowering import folded
from models.parallel import cpu_threads
from models.preprocessing import Preprocessing
from models.program import OfLists, OnnxFlow, Program, serving
from models.trunk import tail_copy

RECORD = Path(__file__).parent.parent / "results" / "engine.json"
BATCHES = (1, 8, 32, 128, 512)
LONGEST = 60.0  # seconds of one batch size, after which no larger one is tried: on a CPU they take a large network many minutes
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the traffic, attacked
DETECTORS_BATCH = 8  # STRIP looks at each image 33 times
REAL = Entry("cifar10", "resnet20", "badnet")


def real(device: torch.device) -> tuple[Guard, Tensor, dict[str, Any]]:
    """The guard that `auto` makes of a suspect of the zoo, clean images, and what it catches."""
    detector = BadExpertGuard("auto")
    record = evaluate(load(REAL), detector, test_images(REAL.dataset), 0, device)
    caught = {"suspect": REAL.stem, "tpr": record["at"]["0.01"]["tpr_masked"], "realised_fpr": record["at"]["0.01"]["realised_fpr"]}
    return detector.guard, test_images(REAL.dataset).images, caught


def untrained(architecture: str, device: torch.device, classes: int = 10) -> tuple[Guard, Tensor, dict[str, Any]]:
    """A guard with random weights, whose gate as many random images reach as clean ones do a real guard's; it can catch nothing."""
    torch.manual_seed(0)
    name, _, asked_size = architecture.partition("@")
    known = architectures.get(name)
    suspect, size = known.build(classes).eval(), int(asked_size or known.size)
    pixels = torch.randint(0, 256, (128, 3, size, size), dtype=torch.uint8)
    preprocessing = Preprocessing(size, size, mean=DATASETS["cifar10"].preprocessing.mean, std=DATASETS["cifar10"].preprocessing.std)
    recipe = auto_recipe(0.01)
    cuts, _ = choose_cuts(suspect, preprocessing.normalise(pixels[:1]), recipe)
    suspect = suspect.to(device).to(memory_format=torch.channels_last)
    experts = [tail_copy(suspect, cuts.experts if cuts else None) for _ in range(recipe.experts)]
    clean = LabelledPixels(pixels.to(device), torch.arange(len(pixels), device=device) % classes)
    auxiliary = copy.deepcopy(suspect)
    guard = lower(Guard(suspect, experts, auxiliary, preprocessing, cuts=cuts), device)
    return fuse(guard, fit_distances(guard, clean, classes), clean, recipe.asked), pixels, {}


class Alone(nn.Module):
    """A suspect without a guard: confidence and label."""

    def __init__(self, suspect: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.suspect, self.preprocessing = suspect, preprocessing

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Of pixels, uint8 [N, 3, size, size]."""
        return tuple(self.suspect(self.preprocessing.normalise(pixels)).float().softmax(-1).max(-1))


def measure(ways: dict[str, Callable[[Tensor], object]], pixels: Tensor, batch: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """Each way in turn, round by round: images a second over all rounds, milliseconds a batch, and shares of the unguarded rate.

    Rates are over all rounds, not of the median one: of single images and small batches most have none that the auxiliary is asked about.
    """
    different = [pixels[(start + torch.arange(batch)) % len(pixels)].to(device) for start in range(0, min(len(pixels), 16 * batch), batch)]

    def once(way: Callable[[Tensor], object], images: Tensor) -> float:
        began = time.perf_counter()
        way(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for way in ways.values():
        for images in different[:3]:
            once(way, images)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    until = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < until or len(taken["unguarded"]) < 5:
        images = different[len(taken["unguarded"]) % len(different)]  # how many of a batch reach the gate is luck
        for name, way in ways.items():
            taken[name].append(once(way, images))
    base = taken["unguarded"]
    return {
        name: {
            "images_per_second": round(batch / statistics.mean(times), 1),
            "p50_ms": round(1000 * statistics.median(times), 3),
            "p99_ms": round(1000 * statistics.quantiles(times, n=100)[98], 3),
            "of_unguarded": round(statistics.mean(base) / statistics.mean(times), 3),
        }
        for name, times in taken.items()
    }


def under_attack(served: nn.Module, pixels: Tensor, batch: int) -> dict[str, Callable[[Tensor], object]]:
    """By the share of a batch that an attacker sends, who wants the guard to be slow: images that reach the gate. The rest is as it comes."""
    reach = pixels[~served(pixels).auxiliary.isnan()]

    def judge(share: float) -> Callable[[Tensor], object]:
        sent = round(share * batch)
        images = torch.cat([reach[torch.arange(sent) % len(reach)], pixels[torch.arange(batch - sent) % len(pixels)]])
        return lambda _: served(images)

    return {f"{share:g}": judge(share) for share in SHARES}


def detectors(suspect: nn.Module, preprocessing: Preprocessing, pixels: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """Others that judge single images, fitted; what they find is of no interest here."""
    classes = suspect(preprocessing.normalise(pixels[:1])).shape[1]
    observed = Observed(suspect, preprocessing, classes, "")
    clean = LabelledPixels(pixels[:128], torch.arange(len(pixels[:128]), device=pixels.device) % classes)
    found: dict[str, Callable[[Tensor], object]] = {}
    for detector in (ScaleUp(), Strip()):
        detector.fit(observed, clean, clean, 0)
        found[detector.name] = detector.score
    return found


def weights(network: nn.Module) -> int:
    """Bytes of distinct parameters and buffers, and of those that are in another runtime."""
    own: dict[int, int] = {each.data_ptr(): each.numel() * each.element_size() for each in network.state_dict(keep_vars=True).values()}
    elsewhere: list[int] = [module.nbytes for module in network.modules() if isinstance(module, OnnxFlow)]
    return sum([*own.values(), *elsewhere])


def as_served(alone: Alone, example: Tensor, most: int) -> dict[str, Callable[[Tensor], object]]:
    """A suspect without a guard, run in each of the ways in which `serving` may run one with it."""
    with torch.no_grad():
        step = OfLists(alone, alone)
        if example.is_cuda:
            recorded = Recorded(step, [example], most, Recorder(example.device))
            return {"unguarded_recorded": lambda images: recorded([images])}
        return {
            "unguarded_traced": torch.jit.trace(alone, example, check_trace=False),
            "unguarded_onnx": OnnxFlow(step, example, torch.get_num_threads(), alone.suspect),
        }


def runtime(served: nn.Module) -> str:
    """What runs that which serves."""
    if not isinstance(served, Program):
        return "eager"
    if any(isinstance(module, Recorded) for module in served.modules()):
        return "cudagraphs"
    return "onnxruntime" if isinstance(served.flow, OnnxFlow) else "torchscript"


def run(architecture: str, device: torch.device, batches: tuple[int, ...], seconds: float, longest: float = math.inf) -> dict[str, Any]:
    """The record of one architecture; longest: seconds of a batch size after which no further one is measured."""
    guard, pixels, caught = real(device) if architecture == REAL.architecture else untrained(architecture, device)
    guard = guard.to(device)
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(guard.suspect, guard.preprocessing.size))
    suspect, preprocessing, example = guard.suspect, guard.preprocessing, pixels[:8].to(device)
    served = serving(guard, example, torch.get_num_threads(), max(batches))
    ways: dict[str, Callable[[Tensor], object]] = {
        "unguarded": Alone(suspect, preprocessing),
        **{name: torch.inference_mode()(way) for name, way in as_served(Alone(folded(suspect), preprocessing), example, max(batches)).items()},
        "guarded": served,
        "guarded_all_attack": lambda images: served(images, ungated=True),
        "naive": Naive(suspect, preprocessing),
    }
    at: dict[str, Any] = {}
    for batch in batches:
        began = time.perf_counter()
        at[str(batch)] = measure(ways, pixels, batch, seconds, device)
        if time.perf_counter() - began > longest:
            break
    best = max(at, key=lambda batch: at[batch]["unguarded"]["images_per_second"])
    fastest = max(way["images_per_second"] for name, way in at[best].items() if name.startswith("unguarded_"))
    few = pixels[:512].to(device)
    usual = {name: ways[name] for name in ("unguarded", "naive")}
    traffic = measure({**usual, **under_attack(served, few, int(best))}, pixels, int(best), seconds, device)
    others = measure({**usual, **detectors(suspect, preprocessing, few)}, pixels, DETECTORS_BATCH, seconds, device)
    return {
        "architecture": architecture.partition("@")[0],
        "size": preprocessing.size,
        **caught,
        "best_batch": int(best),
        "guarded_of_unguarded": at[best]["guarded"]["of_unguarded"],
        "naive_of_unguarded": at[best]["naive"]["of_unguarded"],
        "guarded_of_fastest_unguarded": round(at[best]["guarded"]["images_per_second"] / fastest, 3),
        "attacked_of_naive": round(at[best]["guarded_all_attack"]["images_per_second"] / at[best]["naive"]["images_per_second"], 3),
        "batch_1_latency": round(at["1"]["guarded"]["p50_ms"] / at["1"]["unguarded"]["p50_ms"], 3) if "1" in at else None,
        "runtime": runtime(served),
        "weights_of_suspect": round(weights(served) / weights(suspect), 3),
        "batches": at,
        "attacked_share": {name: way["of_unguarded"] for name, way in traffic.items() if name != "unguarded"},
        "detectors_batch": DETECTORS_BATCH,
        "detectors": {name: way["of_unguarded"] for name, way in others.items() if name not in usual},
        "threads": torch.get_num_threads(),
        **records.circumstances(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", help="may be repeated, and end in @64 for images of another size (default: resnet20, resnet18)")
    usual = f"default: {', '.join(map(str, BATCHES))}, up to the first that takes longer than a minute"
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), help=usual)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way of each batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print whole records")
    parser.add_argument("--record", action="store_true", help="write them to benchmarks/results/engine.json, in place of earlier ones on the same hardware")
    args = parser.parse_args()
    found = []
    for architecture in args.architecture or ["resnet20", "resnet18"]:
        record = run(architecture, torch.device(args.device), args.batches or BATCHES, args.seconds, math.inf if args.batches else LONGEST)
        found.append(record)
        print(json.dumps(record if args.json else {key: value for key, value in record.items() if key != "batches"}), flush=True)
    if args.record:
        records.enlist(RECORD, found, "architecture", "size", "hardware")


if __name__ == "__main__":
    main()
