"""Owns the device and the live bundles: loads, swaps, and runs them. Everything that touches the device goes through here."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

import structlog
import torch
from torch import Tensor, nn

from models import bundle
from models.bundle import Description
from models.device import is_out_of_memory
from models.errors import BundleNotReady, Conflict, Problem
from models.parallel import computing_with, cores, cpu_threads, usual_threads
from models.program import repeated, serving
from models.registry import GuardState, Mode, Registry
from models.threshold import Threshold, conformal_threshold

log = structlog.get_logger()
BATCH_SECONDS = 2.0  # at most: who waits for a batch has a deadline (10 s, where nobody sets another), and one of 20 s counts as a device that hangs


@dataclass(frozen=True, eq=False)
class LiveGuard:
    """A bundle on the device, and what the operator decided about it. Never changed: a swap replaces the whole."""

    name: str
    version: int
    bundle_id: str
    description: Description
    validation_scores: Tensor  # float64 [n], ascending
    network: nn.Module  # uint8 pixels -> Judgement
    threshold: Threshold
    mode: Mode
    threads: int  # CPU threads of a forward
    most: int  # images in a batch


@dataclass(frozen=True)
class Outcome:
    """The judgement of one image by one live guard."""

    label: int
    confidence: float
    score: float
    expert: float | None  # None: what the rest says was clear enough
    auxiliary: float | None  # the same; one of the two is always known
    rejected: bool


class Engine:
    """Loading, activating and running may happen in any thread.

    Of `slots`, a batch of a guard takes `share`: on a CPU a core for each of its threads, so that small networks judge one batch a core; on a GPU all.
    A batch has at most `max_batch` images, of a slow network fewer.
    """

    def __init__(self, registry: Registry, device: torch.device, threads: int | None = None, max_batch: int = 64) -> None:
        self.registry, self.device, self._threads, self._max_batch = registry, device, threads, max_batch
        self.slots = cores() if device.type == "cpu" else 1
        self._live: dict[str, LiveGuard] = {}
        self.decided: set[str] = set()  # guards of which a version was activated here, or that were taken out of service
        self._swap = threading.Lock()
        self._pulse = torch.ones(1, device=device)  # made, and its kernel loaded, while there is memory for them

    def live(self, guard: str) -> LiveGuard | None:
        """The version of a guard that is being served."""
        return self._live.get(guard)

    def share(self, live: LiveGuard) -> int:
        """How many of the slots a batch of this guard takes."""
        return min(self.slots, live.threads)

    def all_live(self) -> list[LiveGuard]:
        return list(self._live.values())

    def load_all(self) -> dict[str, Problem]:
        """Load the active version of every guard; returns what could not be loaded and why. The rest serves."""
        failed: dict[str, Problem] = {}
        for name in self.registry.guards():
            try:
                self.refresh(name)
            except Problem as problem:
                failed[name] = problem
            except Exception as error:  # whatever a foreign network raises is no reason to serve none of the others
                log.exception("guard_raised", guard=name)
                failed[name] = BundleNotReady(f"It cannot be loaded: {type(error).__name__}; the log says where.")
        return failed

    def activate(self, guard: str, version: int) -> LiveGuard:
        """Load and verify a version, then make it the active one: what cannot be served never becomes active, and no request sees a gap."""
        with self._swap:
            loaded = self._load(guard, version)
            try:
                state = self.registry.state(guard)
            except BundleNotReady:  # activation is the way out of a damaged state
                state = GuardState()
            live = _with_state(loaded, replace(state, target_fpr=None))
            self.registry.activate(guard, version)
            self._serve(live)
            self.decided.add(guard)
            give_back_memory()
            return live

    def deactivate(self, guard: str) -> None:
        """Serve no version of a guard any more; its requests are refused. Raises NotFound."""
        with self._swap:
            self.registry.deactivate(guard)
            self._live.pop(guard, None)
            self.decided.add(guard)
        give_back_memory()

    def refresh(self, guard: str) -> LiveGuard | None:
        """Take up the operator's present decisions about a guard; loads its active version where it is not the live one."""
        with self._swap:
            state = self.registry.state(guard)
            if state.active is None:
                return None
            live = self._live.get(guard)
            if live is not None and live.version == state.active:
                return self._serve(_with_state(live, state))
            live = self._serve(_with_state(self._load(guard, state.active), state))
            give_back_memory()
            return live

    def configure(self, guard: str, mode: Mode | None = None, target_fpr: float | None = None, own_target: bool = False) -> None:
        """Change what the operator decided. Raises FprUnreachable, before anything changes, where the validation scores cannot promise the target.

        own_target: take back the target that was set, for the one of the calibration.
        """
        with self._swap:
            self.registry.state(guard)  # NotFound comes before everything else
            live = self._live.get(guard)
            if target_fpr is not None:
                if live is None:
                    raise Conflict("The target FPR can be changed while a version is active; activate one first.")
                if live.version != (active := self.registry.state(guard).active):
                    raise Conflict(f"Version {live.version} is served, but {active} was activated beside this server; activate one of them here first.")
                conformal_threshold(live.validation_scores, target_fpr)
            state = self.registry.configure(guard, mode=mode, target_fpr=target_fpr, own_target=own_target)
            if live is not None:  # a target is one of the active version, which need not be the one that this server has loaded
                self._serve(_with_state(live, state) if live.version == state.active else replace(live, mode=state.mode))

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        """Judge images (uint8 [3, size, size] each) with one bundle. A score that is not finite comes back as it is: the caller refuses it."""
        if self.device.type == "cpu" and torch.get_num_threads() != live.threads:
            torch.set_num_threads(live.threads)  # of this thread alone
        images = torch.stack(pixels)
        if self.device.type != "cpu":  # where nothing is to be moved, even a call that finds that out waits for the interpreter's lock
            images = images.to(self.device, non_blocking=True)
        judged = live.network(images, threshold=live.threshold.value).cpu()
        expert, auxiliary = ([None if math.isnan(value) else value for value in values.tolist()] for values in (judged.expert, judged.auxiliary))
        rejected = live.threshold.rejects(judged.score).tolist()
        columns = (judged.prediction.tolist(), judged.confidence.tolist(), judged.score.tolist(), expert, auxiliary, rejected)
        return [Outcome(*row) for row in zip(*columns, strict=True)]

    def probe(self) -> None:
        """Compute something tiny. Raises what the device raises, where it does so twice: the first time it may tell of what went before.

        After some errors a CUDA context fails on everything until the process ends. Memory that is full is no such error.
        """
        for last in (False, True):
            try:
                self._pulse.fill_(1.0).item()
            except RuntimeError as error:
                if last and not is_out_of_memory(error):
                    raise
            else:
                return

    def _serve(self, live: LiveGuard) -> LiveGuard:
        self._live[live.name] = live
        return live

    def _load(self, guard: str, version: int) -> LiveGuard:
        loaded = bundle.read(self.registry.folder(guard, version), self.device)
        size = loaded.description.preprocessing.size
        try:
            loaded.guard.to(self.device)
            with computing_with(usual_threads()):
                bundle.check(loaded)
                threads = self._threads or (cpu_threads(loaded.guard.suspect, size) if self.device.type == "cpu" else 1)
            images = torch.zeros(8, 3, size, size, dtype=torch.uint8) if loaded.reference is None else loaded.reference.pixels[:8]
            most = largest_batch(loaded.guard, images.to(self.device), threads, self._max_batch)
            network = serving(loaded.guard, images.to(self.device), threads, most, partial(bundle.repeats_verdicts, loaded))
        except RuntimeError as error:  # out of memory is one, too
            raise BundleNotReady("The bundle does not run on this server's device, or does not fit into its memory.") from error
        description = loaded.description
        return LiveGuard(guard, version, loaded.bundle_id, description, loaded.validation_scores, network, description.threshold, "enforce", threads, most)


def largest_batch(network: nn.Module, images: Tensor, threads: int, allowed: int) -> int:
    """How many images, up to `allowed`, a device judges within BATCH_SECONDS although every one reach the gate, as an attacker can have it.

    images: uint8 [N, 3, size, size]. Where these leave any doubt, batches are doubled until one takes half as long or does not fit into memory; of each the
    best of up to three turns counts.
    """
    size, fits = min(len(images), allowed), 0
    with computing_with(threads):
        while True:
            try:
                seconds = _best_turn(network, repeated(images, size))
            except RuntimeError as error:
                if not fits or not is_out_of_memory(error):
                    raise
                return fits
            if seconds * allowed / size < BATCH_SECONDS / 2 or seconds > BATCH_SECONDS / 2 or size == allowed:
                return max(1, min(allowed, math.floor(size * BATCH_SECONDS / seconds)))
            fits, size = size, min(2 * size, allowed)


def _best_turn(network: nn.Module, images: Tensor) -> float:
    turns = list[float]()
    while len(turns) < 3 and sum(turns) < 2 * BATCH_SECONDS:
        began = time.perf_counter()
        network(images, ungated=True).cpu()
        turns.append(time.perf_counter() - began)
    return min(turns)


def give_back_memory() -> None:
    """What the allocator keeps although nothing uses it goes back to the system: glibc's holds a hundred MiB after a few bundles were loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library may have none
    if trim is not None:
        trim(0)


def _with_state(live: LiveGuard, state: GuardState) -> LiveGuard:
    threshold = live.description.threshold
    if state.target_fpr is not None and state.target_fpr != threshold.target_fpr:
        threshold = conformal_threshold(live.validation_scores, state.target_fpr)
    return replace(live, threshold=threshold, mode=state.mode)
