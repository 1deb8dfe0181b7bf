"""The accuracy page is made from the rows alone."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from duquant.config import ALGORITHM_VERSION, PRESETS

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MODULES = ("accuracy_rows", "accuracy_picture", "accuracy_page", "machine")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts, imported as they import each other: from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name)
    return SimpleNamespace(
        page=modules["accuracy_page"].page,
        sections=modules["accuracy_rows"].sections,
        picture=modules["accuracy_picture"].picture,
    )


def row(recipe: str, perplexity: float, seed: int = 0, model: str = "demo:tiny", windows: int = 2) -> dict[str, Any]:
    """A row as accuracy.py writes it."""
    made_by: dict[str, Any] = {}
    if recipe != "fp":
        made_by = {
            "recipe_digest": PRESETS[recipe][1].digest() if recipe in PRESETS else "0" * 64,
            "algorithm_version": ALGORITHM_VERSION,
            "calibration": {"text": "valid.txt", "seq_len": 8, "samples": 4},
        }
    return {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        **made_by,
        "evaluation": {"text": "text.txt", "seq_len": 8, "windows": windows},
        "perplexity": perplexity,
        "bits_per_weight": 16.0,
        "commit": "0123456789",
        "has_uncommitted_changes": seed == 1,
        "machine": {"cpu": "a CPU", "cores": 2},
        "load_at_start": 0.5,
        "date": "2026-11-22",
    }


GOOD, PLAIN = "duquant-fast", "rtn"
BITS = "W4A4KV4"
ROWS = [row("fp", 10.0), row(PLAIN, 40.0), row(GOOD, 12.0), row(GOOD, 14.0, seed=1)]


def cells(page: str, start: str) -> list[str]:
    """The cells of the line that starts so."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_losses_are_logarithms_against_the_same_windows(made: SimpleNamespace) -> None:
    first, second = made.sections([*ROWS, row(GOOD, 99.0, windows=3)])
    assert {entry.recipe: entry.losses for entry in first.entries} == {
        "fp": (),
        GOOD: (math.log(1.2), math.log(1.4)),
        PLAIN: (math.log(4.0),),
    }
    assert [(entry.recipe, entry.losses, entry.loss) for entry in second.entries] == [(GOOD, (), math.inf)]


def test_models_are_compared_with_their_own_unquantized_selves(made: SimpleNamespace) -> None:
    other = [row("fp", 20.0, model="demo:other"), row(GOOD, 22.0, model="demo:other")]
    assert [section.model for section in made.sections([*ROWS, *other])] == ["demo:tiny", "demo:other"]
    assert made.sections([*ROWS, *other])[1].entries[1].losses == (math.log(1.1),)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"algorithm_version": 1}, "version 1 of the algorithm"),
        ({"recipe_digest": "0"}, "an earlier form of the recipe"),
        (
            {"recipe_digest": "0", "algorithm_version": 1},
            "an earlier form of the recipe, version 1 of the algorithm",
        ),
    ],
)
def test_rows_of_before_say_so_and_have_no_mean_with_those_of_today(
    made: SimpleNamespace, changes: dict[str, Any], note: str
) -> None:
    rows = [row("fp", 10.0), row(GOOD, 12.0), {**row(GOOD, 14.0, seed=1), **changes}]
    assert [(entry.losses, entry.note) for entry in made.sections(rows)[0].entries[1:]] == [
        ((math.log(1.2),), ""),
        ((math.log(1.4),), note),
    ]
    assert f"| `{GOOD}` ({note}) | {BITS} | 0.336 |" in made.page(rows)
    assert "(measured earlier)" in made.picture(made.sections(rows))
    assert "(measured earlier)" not in made.picture(made.sections(ROWS))
    assert "Rows with a note" not in made.page(ROWS)


def test_a_row_of_a_recipe_that_is_gone_says_so(made: SimpleNamespace) -> None:
    assert "`no-longer` (a recipe that is gone)" in made.page([*ROWS, row("no-longer", 11.0)])


def test_piqa_is_shown_with_the_larger_of_its_two_errors_and_its_questions(made: SimpleNamespace) -> None:
    def scored(seed: int, acc: float) -> dict[str, Any]:
        scores = {"acc": acc, "acc_stderr": 0.011, "acc_norm": 0.65, "acc_norm_stderr": 0.011, "samples": 1838}
        return {**row(GOOD, 12.0, seed), "piqa": scores}

    page = made.page([row("fp", 10.0), scored(0, 0.60), scored(1, 0.64)])
    assert cells(page, f"`{GOOD}`")[4:7] == ["65.00 ± 1.10", "62.00 ± 2.00", "1,838"]
    assert cells(page, "FP")[4:7] == ["", "", ""]


def test_page_has_a_line_for_each_recipe_the_best_first(made: SimpleNamespace) -> None:
    page = made.page(ROWS)
    lines = [line for line in page.splitlines() if line.startswith(("| FP", "| `"))]
    assert [line.split("|")[1].strip() for line in lines] == ["FP (bfloat16)", f"`{GOOD}`", f"`{PLAIN}`"]
    assert cells(page, f"`{GOOD}`")[1:4] == [BITS, "0.259 ± 0.077", "13.00 ± 1.00"]
    assert cells(page, f"`{GOOD}`")[-1] == "0123456, 0123456*"


def test_picture_is_xml_with_a_bar_for_each_recipe_and_whiskers_for_seeds(made: SimpleNamespace) -> None:
    root = ElementTree.fromstring(made.picture(made.sections([*ROWS, row("<odd & name>", 11.0)])))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<odd & name>" in texts
    assert "1.386, cut off" in texts
    assert "0.259 ± 0.077" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 3
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 1
