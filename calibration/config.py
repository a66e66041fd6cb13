"""What a caller may ask of a calibration. The only module of `calibration` that the service imports."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from models.errors import Problem
from models.registry import check_name
from models.threshold import MOST_FPR

Preset = Literal["auto", "paper"]
Budget = Literal["quick", "standard", "thorough"]


def _guard_name(name: str) -> str:
    try:
        return check_name(name)
    except Problem as problem:
        raise ValueError(problem.detail) from None


def _architecture(name: str) -> str:
    from models import architectures  # imports torch, which a command line that only starts other processes can do without

    try:
        architectures.resolve(name)
    except Problem as problem:
        raise ValueError(problem.detail) from None
    return name


class InspectionConfig(BaseModel):
    """What a caller may say about a suspect. All of it is found where it is not said."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, json_schema_extra={"examples": [{}]})

    architecture: Annotated[str, AfterValidator(_architecture)] | None = Field(None, description="null: found from the checkpoint's keys and shapes")
    num_classes: int | None = Field(None, ge=2, le=100_000, description="null: read off the checkpoint's head; refused where the two disagree")
    classes: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=2, max_length=100_000)] | None = Field(
        None, description="class names in the order of the suspect's outputs, where sorted names are not that order", strict=False
    )
    seed: int = Field(0, ge=0, lt=2**63)


class CalibrationConfig(InspectionConfig):
    """One calibration. Everything but the guard's name has a default that needs no tuning."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "planes", "budget": "standard", "target_fpr": 0.01}]})

    name: Annotated[str, AfterValidator(_guard_name)] = Field(description="the guard's name; a known one gets a further version")
    preset: Preset = Field("auto", description="paper: the published recipe; auto: finds its own settings, costs less to serve")
    budget: Budget = Field(
        "standard",
        description="of auto. quick: default settings, no canaries; standard: canaries choose among four settings and tell the guard's power; "
        "thorough: among six",
    )
    target_fpr: float = Field(0.01, gt=0, le=MOST_FPR, description="share of clean images that may be rejected")

    @property
    def searches(self) -> bool:
        """Whether canaries are planted."""
        return self.preset == "auto" and self.budget != "quick"
