import importlib.util
import json
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from duquant import config
from duquant.config import PRESETS, Recipe

REPOSITORY = Path(__file__).parents[3]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def generate():
    # As when it is run: its folder comes first.
    sys.path.insert(0, str(REPOSITORY / "docs"))
    spec = importlib.util.spec_from_file_location("docs_generate", REPOSITORY / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_what_is_generated_is_current(generate):
    for path, text in generate.generated().items():
        assert path.read_text() == text, "run: make docs"


def test_the_description_of_the_api_breaks_no_client(generate):
    broken = generate.breaking_changes(json.loads(generate.OPENAPI.read_text()), json.loads(generate.openapi_file()))
    assert not broken, "clients of the committed docs/reference/openapi.json would break"


def _leaves(recipe, prefix=""):
    for item in fields(recipe):
        value = getattr(recipe, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def test_the_configuration_page_has_every_recipe_field_and_preset(generate):
    page = generate.config_page()
    assert not [name for name in _leaves(Recipe()) if f"| `{name}` |" not in page]
    assert not [name for name in PRESETS if f"| `{name}`" not in page]


def test_every_recipe_field_has_a_docstring(generate):
    for class_name, _ in generate._RECIPE:
        documented = {name for name, *_ in generate.documented_fields(generate.config_source(class_name), class_name)}
        assert documented == {item.name for item in fields(getattr(config, class_name))}, class_name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not target.startswith(("http://", "https://", "mailto:"))]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_files_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:duquant|infra|service|workers|client|tests|docs|benchmarks)/[\w./-]+\.\w+)`", text))
    assert not [name for name in sorted(named) if "results/" not in name and not (REPOSITORY / name).exists()]
