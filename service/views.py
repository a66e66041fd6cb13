"""Guards as the API shows them: their versions, what each promises, and what is served now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from models import bundle
from models.errors import BundleNotReady, Problem
from models.registry import GuardState
from service.engine import Engine


class GuardVersion(BaseModel):
    """A version of a guard and what it promises."""

    version: int
    bundle_id: str
    created: str
    architecture: str
    num_classes: int
    preset: str
    target_fpr: float
    validation_images: int
    rank: int = Field(description="the threshold is the validation score of this rank, counted from the lowest")
    fpr_interval: tuple[float, float] = Field(description="where the share rejected of the next 1,000 clean images lies with 90% probability")


class GuardView(BaseModel):
    """A guard as an operator sees it."""

    name: str
    active: int | None
    mode: Literal["enforce", "shadow"]
    target_fpr: float | None = Field(description="in force now; null while nothing is active")
    serving: bool
    versions: list[GuardVersion]


class GuardList(BaseModel):
    guards: list[GuardView]


@dataclass(frozen=True)
class GuardViews:
    """Guards as the API shows them; reads the disk, so never call it on the event loop."""

    engine: Engine

    def all(self) -> list[GuardView]:
        return [self.one(name) for name in self.engine.registry.guards()]

    def one(self, guard: str) -> GuardView:
        """Raises NotFound."""
        registry = self.engine.registry
        try:
            state = registry.state(guard)
        except BundleNotReady:  # one damaged state must not hide the other guards; activating mends it
            state = GuardState()
        versions = []
        for version in registry.versions(guard):
            try:
                bundle_id, description, record = bundle.describe(registry.folder(guard, version))
            except Problem:  # a damaged version is not offered; activating it would say why
                continue
            versions.append(
                GuardVersion(
                    version=version,
                    bundle_id=bundle_id,
                    created=record.get("created", ""),
                    architecture=description.architecture,
                    num_classes=description.num_classes,
                    preset=description.preset,
                    target_fpr=description.threshold.target_fpr,
                    validation_images=description.threshold.n,
                    rank=description.threshold.rank,
                    fpr_interval=description.threshold.interval,
                )
            )
        live = self.engine.live(guard)
        return GuardView(
            name=guard,
            active=state.active,
            mode=state.mode,
            target_fpr=live.threshold.target_fpr if live else None,
            serving=live is not None,
            versions=versions,
        )
