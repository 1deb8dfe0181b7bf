"""Options of benchmarks are refused when they are read, not when a run comes to them."""

import importlib
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("options")
    monkeypatch.delitem(sys.modules, "options")
    return module


def test_numbers_are_whole_and_large_enough(options: ModuleType) -> None:
    assert (options.count("1"), options.seed("0")) == (1, 0)
    for read, text in ((options.count, "0"), (options.seed, "-1"), (options.count, "2.5"), (options.count, "many")):
        with pytest.raises(ArgumentTypeError, match=f"'{text}' is no whole number from"):
            read(text)


def test_models_have_to_be_here(options: ModuleType, tmp_path: Path) -> None:
    assert options.model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ArgumentTypeError, match="no model directory"):
        options.model(str(tmp_path / "none"))
