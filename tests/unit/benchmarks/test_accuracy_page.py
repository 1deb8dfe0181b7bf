"""The accuracy page is made from the rows alone."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def accuracy_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("accuracy_page", BENCHMARKS / "accuracy_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accuracy_page", module)
    spec.loader.exec_module(module)
    return module


def row(recipe: str, perplexity: float, seed: int = 0, model: str = "demo:tiny", windows: int = 2) -> dict[str, Any]:
    return {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "evaluation": {"text": "text.txt", "seq_len": 8, "windows": windows},
        "perplexity": perplexity,
        "bits_per_weight": 16.0,
        "commit": "0123456789",
        "has_uncommitted_changes": seed == 1,
        "machine": {"cpu": "a CPU", "cores": 2},
        "load_at_start": 0.5,
    }


ROWS = [row("fp", 10.0), row("plain", 40.0), row("good", 12.0), row("good", 14.0, seed=1)]


def test_losses_are_logarithms_against_the_same_windows(accuracy_page: ModuleType) -> None:
    found = accuracy_page.losses([*ROWS, row("good", 99.0, windows=3)])
    assert found == {
        ("demo:tiny", "plain"): [math.log(4.0)],
        ("demo:tiny", "good"): [math.log(1.2), math.log(1.4)],
    }


def test_piqa_is_shown_with_the_larger_of_its_two_errors(accuracy_page: ModuleType) -> None:
    def scored(seed: int, acc: float) -> dict[str, Any]:
        scores = {"acc": acc, "acc_stderr": 0.011, "acc_norm": 0.65, "acc_norm_stderr": 0.011, "samples": 1838}
        return {**row("good", 12.0, seed), "piqa": scores}

    lines = accuracy_page.page([row("fp", 10.0), scored(0, 0.60), scored(1, 0.64)]).splitlines()
    good = next(line.split("|") for line in lines if line.startswith("| `good`"))
    assert [cell.strip() for cell in good[4:6]] == ["65.00 ± 1.10", "62.00 ± 2.00"]
    unmeasured = next(line.split("|") for line in lines if line.startswith("| FP"))
    assert [cell.strip() for cell in unmeasured[4:6]] == ["", ""]


def test_page_has_a_line_for_each_recipe_the_best_first(accuracy_page: ModuleType) -> None:
    lines = [line for line in accuracy_page.page(ROWS).splitlines() if line.startswith(("| FP", "| `"))]
    assert [line.split("|")[1].strip() for line in lines] == ["FP (bfloat16)", "`good`", "`plain`"]
    assert "13.00 ± 1.00" in lines[1]
    assert "0123456, 0123456*" in lines[1]


def test_picture_is_xml_with_a_bar_for_each_recipe(accuracy_page: ModuleType) -> None:
    root = ElementTree.fromstring(accuracy_page.picture([*ROWS, row("<odd & name>", 11.0)]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<odd & name>" in texts
    assert "1.386 (cut off)" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 3
