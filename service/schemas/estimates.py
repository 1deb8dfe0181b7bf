"""How long a job would take and how large its artifact would become."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from duquant.config import DEFAULT_PRESET, preset
from service.schemas.common import check_text
from service.schemas.models import ModelRequest
from service.schemas.recipes import CalibrationOverrides, RecipeInput

TimeBasis = Literal["same_work", "same_model", "same_recipe", "none"]
SizeBasis = Literal["same_work", "same_model", "shape", "none"]


class EstimateRequest(BaseModel):
    """The job to estimate; the same fields as when it is submitted."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: ModelRequest
    """The model to quantize."""
    recipe: RecipeInput = Field(default_factory=lambda: preset(DEFAULT_PRESET))
    """A preset's name, or a whole recipe."""
    calibration: CalibrationOverrides | None = None
    """Changes to the recipe's calibration."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class TimeEstimate(BaseModel):
    """How long it runs once it has started."""

    seconds: float | None
    gpu_seconds: float | None
    basis: TimeBasis
    """same_work: the median of jobs with this model and recipe. same_model: of jobs with this model and other recipes,
    scaled by how often the layers are run. same_recipe: scaled by the sizes of the layers from jobs with this recipe
    and other models. none: nothing is known.
    """
    jobs: int
    """How many finished jobs of this project it is taken from."""


class SizeEstimate(BaseModel):
    """How large the artifact becomes."""

    bytes: int | None
    basis: SizeBasis
    """same_work, same_model: as above, of recipes with as many bits. shape: computed from the model's config.json."""
    jobs: int


class EstimateView(BaseModel):
    """What is known before the work is done; a job that is submitted may wait first."""

    reuses: str | None
    """The job that would be returned in place of a new one, unless `force` is set: the same work is or was done."""
    fingerprint: str
    layers: int | None
    """Decoder layers of the model; null when its shape is not known to the service."""
    time: TimeEstimate
    size: SizeEstimate
