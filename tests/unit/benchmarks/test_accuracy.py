"""What benchmarks/accuracy.py plans to measure."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from duquant.config import PRESETS
from duquant.models.families.gemma import GEMMA3
from duquant.models.families.llama import LLAMA

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MODULES = ("accuracy", "accuracy_authors", "accuracy_page", "accuracy_picture", "accuracy_rows")
SHARED = ("row_file", "quantize", "machine", "unseen_text")


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("accuracy")
    for name in (*MODULES, *SHARED):
        monkeypatch.delitem(sys.modules, name)
    return module


def test_every_recipe_is_planned_for_every_model_that_it_takes(accuracy: ModuleType) -> None:
    arguments = Namespace(model=None, recipe=None, seed=[0], samples=2, seq_len=16, windows=1)
    planned = [(row["model"], row["recipe"]) for row in accuracy._planned(arguments, "valid.txt", "test.txt")]
    architectures = {"demo:smollm2-135m": LLAMA, "demo:gemma3-270m": GEMMA3}
    assert set(architectures) == set(accuracy.MODELS)
    expected = []
    for model, architecture in architectures.items():
        rotatable = not architecture.has_output_norms
        names = [name for name, (_, recipe) in PRESETS.items() if rotatable or not recipe.transform.rotates_residual]
        expected += [(model, "fp"), *((model, name) for name in names)]
    assert planned == expected
    assert len(planned) == 2 * (1 + len(PRESETS)) - 1
