"""`duquant recipe`: the presets, and reading recipes from files."""

import json
from pathlib import Path
from typing import Any

import typer

from client.errors import BadInputError
from client.output import JsonFlag, print_json, print_table
from duquant.config import DEFAULT_PRESET, PRESETS, Recipe, preset

app = typer.Typer(help="Recipes: how to quantize.", no_args_is_help=True)

_LARGEST_FILE = 1_000_000


def read_json_file(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        BadInputError: it cannot be read, or is no JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise BadInputError(f"{path} is too large for {what}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is no JSON: {error}") from error


def is_file_name(text: str) -> bool:
    """Return whether a --recipe value means a file: it ends in .json or has a folder in it."""
    return text.endswith(".json") or "/" in text


def load_recipe(text: str) -> Recipe:
    """Return the preset of that name, or the recipe in that file.

    Raises:
        BadInputError: the file cannot be read.
        ConfigError: there is no such preset, or a field in the file is wrong.
    """
    if not is_file_name(text):
        return preset(text)
    values = read_json_file(Path(text), "the recipe")
    if not isinstance(values, dict):
        raise BadInputError(f"{text} must hold a JSON object")
    return Recipe.from_dict(values)


@app.command("list")
def list_recipes(*, as_json: JsonFlag = False) -> None:
    """List the presets."""
    items = [
        {"name": name, "summary": summary, "is_default": name == DEFAULT_PRESET, "digest": recipe.digest()}
        for name, (summary, recipe) in PRESETS.items()
    ]
    if as_json:
        print_json({"items": items})
        return
    rows = [(f"{item['name']}{' (default)' if item['is_default'] else ''}", item["summary"]) for item in items]
    print_table(("recipe", "what it is"), rows)


@app.command("show")
def show_recipe(
    name: str = typer.Argument(help="A preset, or a recipe file (.json)."), *, as_json: JsonFlag = False
) -> None:
    """Show every field of a recipe; the output is a recipe file."""
    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.to_dict())
    else:
        typer.echo(json.dumps(recipe.to_dict(), indent=2))
