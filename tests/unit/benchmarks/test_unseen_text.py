"""The text that nothing was tuned on: quotations of several collections in turn."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def unseen_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("unseen_text")
    monkeypatch.delitem(sys.modules, "unseen_text")
    return module


def test_collections_take_turns(unseen_text: ModuleType, tmp_path: Path) -> None:
    for name in ("law", "people", "science", "wisdom"):
        (tmp_path / name).write_text(f"{name} one.\n%\n", encoding="utf-8")
    (tmp_path / "people").write_text("people one.\n\t-- A. Nobody\n%\npeople two.\n%\n", encoding="utf-8")
    assert unseen_text.quotations(tmp_path) == (
        "law one.\n\npeople one.\n\t-- A. Nobody\n\nscience one.\n\nwisdom one.\n\npeople two.\n"
    )


def test_nothing_without_the_package(unseen_text: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "law").write_text("law one.\n%\n", encoding="utf-8")
    assert unseen_text.quotations(tmp_path) == ""
