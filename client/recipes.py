"""`duquant recipe`: the presets, and reading recipes from files."""

import json
from pathlib import Path
from typing import Any

import typer
import yaml

from client.errors import BadInputError
from client.output import Format, print_table, print_text, show, with_output
from duquant.config import DEFAULT_PRESET, PRESETS, Recipe, preset

app = typer.Typer(help="Recipes: how to quantize.", no_args_is_help=True)

_LARGEST_FILE = 1_000_000
_YAML = (".yaml", ".yml")


def preset_names() -> list[str]:
    """Return the presets, for a shell that completes their names."""
    return list(PRESETS)


def read_data_file(path: Path, what: str) -> Any:
    """Read a JSON file, or a YAML file by its name's end.

    Raises:
        BadInputError: it cannot be read, or is neither.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise BadInputError(f"{path} is too large for {what}")
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix in _YAML else json.loads(text)
    except OSError as error:
        raise BadInputError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is no JSON: {error}") from error
    except yaml.YAMLError as error:
        raise BadInputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def is_file_name(text: str) -> bool:
    """Return whether a --recipe value means a file: it ends in .json or .yaml, or has a folder in it."""
    return text.endswith((".json", *_YAML)) or "/" in text


def load_recipe(text: str) -> Recipe:
    """Return the preset of that name, or the recipe in that file.

    Raises:
        BadInputError: the file cannot be read.
        ConfigError: there is no such preset, or a field in the file is wrong.
    """
    if not is_file_name(text):
        return preset(text)
    values = read_data_file(Path(text), "the recipe")
    if not isinstance(values, dict):
        raise BadInputError(f"{text} must hold a JSON object")
    return Recipe.from_dict(values)


@app.command("list")
@with_output
def list_recipes(*, output: Format) -> None:
    """List the presets."""
    items = [
        {"name": name, "summary": summary, "is_default": name == DEFAULT_PRESET, "digest": recipe.digest()}
        for name, (summary, recipe) in PRESETS.items()
    ]
    rows = [(f"{item['name']}{' (default)' if item['is_default'] else ''}", item["summary"]) for item in items]
    show({"items": items}, output, lambda: print_table(("recipe", "what it is"), rows))


@app.command("show")
@with_output
def show_recipe(
    name: str = typer.Argument(help="A preset, or a recipe file (.json or .yaml).", autocompletion=preset_names),
    *,
    output: Format,
) -> None:
    """Show every field of a recipe; the output is a recipe file."""
    recipe = load_recipe(name).to_dict()
    show(recipe, output, lambda: print_text(json.dumps(recipe, indent=2)))
