"""Guards as the API shows them: their versions, what each promises, and what is served now."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from models import bundle
from models.errors import BundleNotReady, NotFound, Problem
from models.registry import GuardState
from service.engine import Engine, LiveGuard


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


class Served(BaseModel):
    """What judges the images that are sent to a guard now."""

    version: int
    bundle_id: str
    mode: Literal["enforce", "shadow"]
    target_fpr: float = Field(description="of this version's calibration, or as it was changed since it was activated")
    fpr_interval: tuple[float, float] = Field(description="where the share rejected of the next 1,000 clean images lies with 90% probability")


class GuardView(BaseModel):
    """A guard as an operator sees it: `active` and `mode` are what was decided and stands on the disk, `served` is what is in force on this server.

    The two differ where a version was activated beside a running server (`calibrate --activate`; it is served after a restart, or once it is activated over
    HTTP), and where what was decided cannot be read.
    """

    name: str
    active: int | None = Field(description="the version that was activated last; null where none was, or where that cannot be read")
    mode: Literal["enforce", "shadow"] | None = Field(description="as it was decided; null where that cannot be read: activate a version again")
    target_fpr: float | None = Field(description="in force now; null while nothing is served")
    serving: bool = Field(description="whether a version is served")
    served: Served | None = Field(description="the version and the mode in force on this server; null while nothing is served")
    versions: list[GuardVersion]


class GuardList(BaseModel):
    guards: list[GuardView]


@dataclass(frozen=True)
class GuardViews:
    """Guards as the API shows them; reads the disk, so never call it on the event loop."""

    engine: Engine

    def all(self) -> list[GuardView]:
        views = []
        for name in self.engine.registry.guards():
            with suppress(NotFound):  # its last version was deleted meanwhile
                views.append(self.one(name))
        return views

    def one(self, guard: str) -> GuardView:
        """Raises NotFound."""
        registry = self.engine.registry
        state: GuardState | None = None
        with suppress(BundleNotReady):  # one damaged state must not hide the other guards; activating mends it
            state = registry.state(guard)
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
            active=state.active if state else None,
            mode=state.mode if state else None,
            target_fpr=live.threshold.target_fpr if live else None,
            serving=live is not None,
            served=_served(live) if live else None,
            versions=versions,
        )


def _served(live: LiveGuard) -> Served:
    target, interval = live.threshold.target_fpr, live.threshold.interval
    return Served(version=live.version, bundle_id=live.bundle_id, mode=live.mode, target_fpr=target, fpr_interval=interval)
