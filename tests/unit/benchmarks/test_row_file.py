"""Tables that are measured row by row: what is measured, what is measured again, what an interruption leaves."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def row_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("row_file")
    for name in ("row_file", "quantize", "machine"):
        monkeypatch.delitem(sys.modules, name)
    return module


@pytest.fixture
def table(row_file: ModuleType, tmp_path: Path) -> Any:
    return row_file.RowFile(tmp_path / "rows.json", place=("recipe", "seed"), identity=("digest",))


def plans(*digests: str) -> list[dict[str, Any]]:
    return [{"recipe": "rtn", "seed": seed, "digest": digest} for seed, digest in enumerate(digests)]


def test_a_row_is_measured_once_and_again_when_its_recipe_has_changed(table: Any) -> None:
    measured = []

    def measure(plan: dict[str, Any]) -> dict[str, Any]:
        measured.append((plan["seed"], plan["digest"]))
        return {"perplexity": 20.0 + plan["seed"]}

    table.measure(plans("a", "a"), measure)
    rows = table.measure(plans("a", "b"), measure)
    assert measured == [(0, "a"), (1, "a"), (1, "b")]
    assert [(row["seed"], row["digest"], row["perplexity"]) for row in rows] == [(0, "a", 20.0), (1, "b", 21.0)]
    assert rows == table.read()
    assert {"command", "commit", "machine", "load_at_start"} <= rows[0].keys()


def test_what_was_measured_before_an_interruption_is_kept(table: Any) -> None:
    def measure(plan: dict[str, Any]) -> dict[str, Any]:
        if plan["seed"] == 1:
            raise KeyboardInterrupt
        return {"perplexity": 20.0}

    with pytest.raises(KeyboardInterrupt):
        table.measure(plans("a", "a"), measure)
    assert [row["seed"] for row in json.loads(table.path.read_text())["rows"]] == [0]


def test_a_row_stays_where_it_was(table: Any) -> None:
    def measure(plan: dict[str, Any]) -> dict[str, Any]:
        return {"perplexity": 20.0 + (plan["digest"] == "b")}

    table.measure(plans("a", "a"), measure)
    rows = table.measure(plans("b"), measure)
    assert [(row["seed"], row["perplexity"]) for row in rows] == [(0, 21.0), (1, 20.0)]


def test_rows_of_another_run_meanwhile_are_kept(table: Any) -> None:
    def measure(_plan: dict[str, Any]) -> dict[str, Any]:
        if not table.path.exists():
            table.measure([{"recipe": "awq", "seed": 0, "digest": "b"}], lambda _other: {"perplexity": 1.0})
        return {"perplexity": 20.0}

    rows = table.measure(plans("a"), measure)
    assert [row["recipe"] for row in rows] == ["awq", "rtn"]
    assert rows == table.read()


def test_a_row_that_lacks_something_is_measured_again_when_that_is_asked_for(
    table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    table.measure(plans("a"), lambda _plan: {"perplexity": {"wiki": 20.0, "help": 8.25}})
    assert capsys.readouterr().out == "rtn seed 0: perplexity wiki 20.000, help 8.250\n"

    def measure(_plan: dict[str, Any]) -> dict[str, Any]:
        return {"perplexity": 20.0, "piqa": {"acc_norm": 0.5}, "calibration_seconds": 1.5}

    table.measure(plans("a"), measure)
    assert capsys.readouterr().out == "rtn seed 0: measured before\n"
    (row,) = table.measure(plans("a"), measure, lacks=lambda row: "" if "piqa" in row else "PIQA")
    assert row["piqa"] == {"acc_norm": 0.5}
    assert "without PIQA, so measured again" in (told := capsys.readouterr().out)
    assert told.endswith("perplexity 20.000; PIQA 0.5000; 1.5 s\n")
