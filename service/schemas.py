"""The JSON that goes in and out. Recipes are duquant.config's own dataclasses, so there is one description of them."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, overload

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from duquant.config import DEFAULT_PRESET, PRESETS, Recipe, TextSource, preset

PresetName = Annotated[str, Field(description="The name of a preset", json_schema_extra={"enum": list(PRESETS)})]


def _check_text(value: object) -> None:
    """Refuse strings that no database takes: NUL characters and lone surrogates."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str) and ("\0" in item or any("\ud800" <= char <= "\udfff" for char in item)):
            raise ValueError("text must not hold NUL characters or lone surrogates")


def _read_recipe(value: object, validate: ValidatorFunctionWrapHandler) -> Recipe:
    """Take a preset's name or a recipe object.

    pydantic reports every wrong field with its place; the second reading is as strict as the command line's about
    types, so that "4" is not 4 here and an error there.
    """
    if isinstance(value, str):
        return preset(value)
    recipe = validate(value)
    assert isinstance(recipe, Recipe)
    return Recipe.from_dict(value) if isinstance(value, dict) else recipe


class ModelRequest(BaseModel):
    """The model to quantize. Local models are names below the server's model roots, never paths."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    source: Literal["demo", "local", "hub"]
    """demo: the model that comes with the demo; local: a folder below a model root; hub: a Hugging Face repository."""
    name: str = Field(min_length=1, max_length=300, examples=["smollm2-135m"])
    """smollm2-135m, the folder's name, or owner/repository."""
    revision: str | None = Field(default=None, max_length=100)
    """A full commit hash; needed for hub models and unused for the rest."""


class CalibrationOverrides(BaseModel):
    """Calibration fields that replace the recipe's; what is left out stays as the recipe has it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    source: TextSource | None = None
    """The calibration text, as a whole."""
    samples: StrictInt | None = None
    """Windows of seq_len tokens."""
    seq_len: StrictInt | None = None
    """Tokens in a window."""
    shards: StrictInt | None = None
    """Independent groups of windows."""
    micro_batch: StrictInt | None = None
    """Windows in one forward pass."""
    search_tokens: StrictInt | None = None
    """Tokens per site that rotation and permutation are searched on."""


class JobRequest(BaseModel):
    """The job to submit."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: ModelRequest
    """The model to quantize."""
    recipe: Annotated[Recipe, WrapValidator(_read_recipe, json_schema_input_type=PresetName | Recipe)] = Field(
        default_factory=lambda: preset(DEFAULT_PRESET)
    )
    """A preset's name, or a whole recipe."""
    calibration: CalibrationOverrides | None = None
    """Changes to the recipe's calibration."""
    priority: int = Field(default=100, ge=0, le=1000, strict=True)
    """Lower numbers start first."""
    force: bool = Field(default=False, strict=True)
    """Make the artifact again even if there is one for this model and recipe."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        _check_text(value)
        return value


class Progress(BaseModel):
    """How far the present phase is."""

    phase: str | None
    done: int
    total: int


class LayerCounts(BaseModel):
    """How many of the job's layers are in each state. The embeddings and the head count as one."""

    total: int
    pending: int
    running: int
    done: int
    failed: int


class JobSummary(BaseModel):
    """A job, as lists show it."""

    id: str
    kind: str
    state: str
    """blocked, scheduled, queued, running, cancelling, succeeded, failed or cancelled; more may come."""
    reason: str | None
    """Why it failed, as a word."""
    detail: str | None
    """Why it failed, in a sentence."""
    model: ModelRequest
    recipe_name: str
    priority: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    max_attempts: int
    lease_losses: int
    progress: Progress
    fingerprint: str
    """The same for equal models and recipes."""


class JobDetail(JobSummary):
    """A job."""

    recipe: dict[str, Any]
    layers: LayerCounts
    queue_position: int | None
    """1 is next; null when it is not waiting."""
    eta_seconds: float | None
    """Estimated time left; null while there is nothing to estimate from."""
    result: dict[str, Any] | None
    version: int


class JobSubmitted(JobDetail):
    """A job, and whether it was there before."""

    reused: bool
    """True when an active or finished job for the same model and recipe was returned and nothing new was started."""


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    items: list[JobSummary]
    next_cursor: str | None
    """Give it back as `cursor` for the next page; null on the last."""


class LayerView(BaseModel):
    """One layer of a job."""

    layer: int
    """Index of the decoder layer; -1 is the shard with embeddings, final norm and head."""
    state: str
    attempt: int
    seconds: float | None
    size_bytes: int | None
    sha256: str | None
    metrics: dict[str, Any]
    node: str | None
    detail: str | None
    """What went wrong, when its last attempt failed."""
    started_at: datetime | None
    finished_at: datetime | None


class LayerList(BaseModel):
    """The layers of a job, in order."""

    items: list[LayerView]


class ArtifactFile(BaseModel):
    """One file of an artifact and where to get it."""

    name: str
    sha256: str
    size_bytes: int
    url: str
    """A link that works until expires_at, without the API key, with ranges."""


class ArtifactView(BaseModel):
    """A finished artifact."""

    job_id: str
    fingerprint: str
    size_bytes: int
    expires_at: datetime
    evaluation: dict[str, Any]
    files: list[ArtifactFile]
    """manifest.json is the last."""


class RecipeView(BaseModel):
    """A preset."""

    name: str
    summary: str
    is_default: bool
    digest: str
    recipe: dict[str, Any]


class RecipeList(BaseModel):
    """All presets."""

    items: list[RecipeView]


class Check(BaseModel):
    """Whether one part works."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """Whether the service can do its work, part by part."""

    ready: bool
    checks: dict[str, Check]


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """What is running."""

    version: str
    algorithm_version: int
    python: str


@overload
def moment(at_ms: int) -> datetime: ...
@overload
def moment(at_ms: None) -> None: ...
def moment(at_ms: int | None) -> datetime | None:
    """Turn the job store's milliseconds into a time."""
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)
