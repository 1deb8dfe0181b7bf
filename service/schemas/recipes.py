"""Recipes: presets by name or whole ones, and changes to their calibration."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidatorFunctionWrapHandler, WrapValidator

from duquant.config import PRESETS, Recipe, TextSource, preset

PresetName = Annotated[str, Field(description="The name of a preset", json_schema_extra={"enum": list(PRESETS)})]


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


RecipeInput = Annotated[Recipe, WrapValidator(_read_recipe, json_schema_input_type=PresetName | Recipe)]
"""A recipe in a request: the name of a preset, or a whole one."""


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
