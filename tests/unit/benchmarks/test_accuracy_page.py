"""The accuracy page is made from the rows alone."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from duquant.config import ALGORITHM_VERSION, PRESETS

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MODULES = ("accuracy_rows", "accuracy_picture", "accuracy_authors", "accuracy_goals", "accuracy_page", "machine")


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
    first, second = row("fp", 20.0, model="demo:other"), row(GOOD, 22.0, model="demo:other")
    mixed = [ROWS[0], first, *ROWS[1:], second]
    assert [section.model for section in made.sections(mixed)] == ["demo:tiny", "demo:other"]
    assert made.sections(mixed)[1].entries[1].losses == (math.log(1.1),)


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
def test_rows_of_before_say_so_and_give_way_to_those_of_today(
    made: SimpleNamespace, changes: dict[str, Any], note: str
) -> None:
    rows = [row("fp", 10.0), {**row(GOOD, 14.0, seed=1), **changes}]
    assert f"| `{GOOD}` ({note}) | {BITS} | 0.336 |" in made.page(rows)
    assert "(measured earlier)" in made.picture(made.sections(rows))
    entries = made.sections([*rows, row(GOOD, 12.0)])[0].entries
    assert [(entry.losses, entry.note) for entry in entries[1:]] == [((math.log(1.2),), "")]
    assert "(measured earlier)" not in made.picture(made.sections(ROWS))
    assert "Rows with a note" not in made.page(ROWS)


def test_a_row_of_a_recipe_that_is_gone_says_so(made: SimpleNamespace) -> None:
    assert "`no-longer` (a recipe that is gone)" in made.page([*ROWS, row("no-longer", 11.0)])


def scored(made_row: dict[str, Any], acc: float) -> dict[str, Any]:
    scores = {"acc": acc, "acc_stderr": 0.011, "acc_norm": 0.65, "acc_norm_stderr": 0.011, "samples": 1838}
    return {**made_row, "piqa": scores}


def test_piqa_has_a_table_with_the_larger_of_two_errors_and_what_is_lost(made: SimpleNamespace) -> None:
    rows = [
        row("fp", 10.0),
        row(PLAIN, 40.0),
        *(scored(row(GOOD, 12.0, seed), acc) for seed, acc in enumerate((0.6, 0.64))),
    ]
    page = made.page(rows)
    table = page[page.index("### PIQA") : page.index("### Where and when")]
    assert "1,838 questions" in table
    assert cells(table, f"`{GOOD}`") == [f"`{GOOD}`", "65.00 ± 1.10", "", "62.00 ± 2.00", "", "2"]
    assert table.count("| `") == 1
    page = made.page([scored(rows[0], 0.655), *rows[1:]])
    table = page[page.index("### PIQA") : page.index("### Where and when")]
    assert cells(table, f"`{GOOD}`")[1:] == ["65.00 ± 1.10", "0.0", "62.00 ± 2.00", "3.5", "2"]
    assert cells(table, "FP")[1:] == ["65.00 ± 1.10", "", "65.50 ± 1.10", "", "1"]
    assert "PIQA" not in made.page(ROWS)


def test_the_unseen_text_has_a_degradation_of_its_own(made: SimpleNamespace) -> None:
    rows = [{**each, "unseen": {"perplexity": 2 * each["perplexity"] + 10}} for each in ROWS[:-1]]
    page = made.page([*rows, ROWS[-1]])
    assert cells(page, "FP")[4] == "0"
    assert cells(page, f"`{GOOD}`")[4] == f"{math.log(34 / 30):.3f} (1 seed)"
    assert cells(page, f"`{PLAIN}`")[4] == f"{math.log(90 / 30):.3f}"
    assert cells(made.page([ROWS[0], *rows[1:]]), f"`{GOOD}`")[4] == ""


def test_recipes_that_round_weights_alone_stand_last_in_another_colour(made: SimpleNamespace) -> None:
    rows = [*ROWS, row("awq", 11.0)]
    assert [entry.recipe for entry in made.sections(rows)[0].entries] == ["fp", GOOD, PLAIN, "awq"]
    drawn, without = (made.picture(made.sections(each)).count('fill="#2f6690"') for each in (rows, ROWS))
    assert drawn == without


def test_rows_say_where_and_how_busy(made: SimpleNamespace) -> None:
    cost = {"calibration_seconds": 100.0, "peak_rss_bytes": 2**20}
    there = {"cpu": "another CPU", "cores": 2, "threads": 1}
    busy = {**row(PLAIN, 40.0), **cost, "load_at_start": 3.0, "machine": there}
    slow = {**row(GOOD, 14.0, seed=1), **cost, "calibration_seconds": 300.4}
    page = made.page([ROWS[0], busy, {**row(GOOD, 12.0), **cost}, slow])
    assert [cells(page, f"`{name}`")[-2:] for name in (GOOD, PLAIN)] == [
        ["100 to 300 s", "1 MiB"],
        ["≤ 100 s", "1 MiB"],
    ]
    runs = page[page.index("### Where and when") :]
    assert cells(runs, f"`{GOOD}`")[1:] == ["1", "not recorded", "2026-11-22", "0123456, 0123456*"]
    assert cells(runs, f"`{PLAIN}`")[1:3] == ["2", "1"]
    assert "Machine: 1: a CPU, 2 cores; 2: another CPU, 2 cores." in runs
    assert "A star marks" in runs
    assert "A star marks" not in made.page([ROWS[0], busy])


def test_other_texts_among_the_windows_are_named(made: SimpleNamespace) -> None:
    told = "Of the windows of `duquant-distilled`, 50 % of the text that ships with Python."
    assert told in made.page([*ROWS, row("duquant-distilled", 11.0)])
    assert "Of the windows" not in made.page(ROWS)


def test_the_authors_figures_stand_below_the_rows_of_the_same_windows(made: SimpleNamespace) -> None:
    windows = {"text": "wikitext2-test.txt", "seq_len": 2048, "windows": 16}
    rows = [
        {**row(name, value, model="demo:smollm2-135m"), "evaluation": windows}
        for name, value in (("fp", 20.0), ("rtn", 40.0))
    ]
    page = made.page(rows)
    assert page.count("### The authors' code") == 1
    assert cells(page, "RTN") == ["RTN", "4.352", "1588.00", "`rtn`: 0.693", "4.272", "1466.00"]
    assert "authors' code" not in made.page(ROWS)


def test_page_has_a_line_for_each_recipe_the_best_first(made: SimpleNamespace) -> None:
    page = made.page(ROWS)
    lines = [line for line in page.splitlines() if line.startswith(("| FP", "| `"))]
    names = ["FP (bfloat16)", f"`{GOOD}`", f"`{PLAIN}`"]
    assert [line.split("|")[1].strip() for line in lines] == 2 * names
    assert cells(page, f"`{GOOD}`")[1:4] == [BITS, "0.259 ± 0.077", "13.00 ± 1.00"]


def reported(
    made: SimpleNamespace,
    losses: dict[str, float],
    unseen: dict[str, float],
    there: dict[str, float],
    answers: float = 0.631,
) -> dict[str, list[str]]:
    """The goals of rows with these D, by their beginnings."""

    def rows_of(model: str, values: dict[str, float]) -> list[dict[str, Any]]:
        windows = {"text": "wikitext2-test.txt", "seq_len": 2048, "windows": 16}
        return [
            {**row(name, 20 * math.exp(loss), model=model), "evaluation": windows, "calibration_seconds": 601.0}
            for name, loss in {"fp": 0.0, **values}.items()
        ]

    here = [
        {**each, "unseen": {"perplexity": 30 * math.exp(unseen[each["recipe"]])}} if each["recipe"] in unseen else each
        for each in rows_of("demo:smollm2-135m", losses)
    ]
    here = [scored(each, 0.645 if each["recipe"] == "fp" else answers) for each in here]
    here.append({**here[1], "seed": 1, "perplexity": 20 * math.exp(1.1 * losses["duquant-best"])})
    page = made.page([*here, *rows_of("demo:other", there)])
    assert page.index("### Goals") < page.index("## demo:smollm2-135m")
    lines = page[page.index("### Goals") :].split("\n\n")[2].splitlines()[2:]
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines}


LOSSES = {"duquant-best": 0.2, "duquant-gptq": 0.23, "duquant-fast": 0.46}


def test_goals_have_verdicts(made: SimpleNamespace) -> None:
    goals = reported(made, LOSSES, {"fp": 0.0, **LOSSES}, LOSSES)
    assert goals["`duquant-best`: D at most 0.22 (the aim)"] == ["0.210", "met"]
    assert goals["`duquant-fast`: D at most 0.45"] == ["0.460", "**missed**"]
    assert goals["`duquant-best`: calibration in at most 10 minutes on 2 cores"][1] == "**missed**"
    assert goals["`duquant-best`: PIQA, acc, within 1.5 points of the unquantized model"] == ["1.4 points less", "met"]
    assert goals["seeds change D by less than 10 %"] == ["9.5 % at most (`duquant-best`), 1 recipes", "met"]
    assert not [goal for goal in goals if "lwc" in goal]
    goals = reported(made, LOSSES, {}, LOSSES, answers=0.62)
    assert goals["`duquant-best`: PIQA, acc, within 1.5 points of the unquantized model"] == [
        "2.5 points less",
        "**missed**",
    ]


def test_orders_are_compared_where_recipes_are_apart(made: SimpleNamespace) -> None:
    level = {"fp": 0.0, "duquant-best": 0.25, "duquant-gptq": 0.24, "duquant-fast": 0.4}
    turned = {"duquant-best": 0.2, "duquant-gptq": 0.5, "duquant-fast": 0.3}
    goals = {name.partition(", of")[0]: found for name, found in reported(made, LOSSES, level, turned).items()}
    assert goals["the same order on the unseen text"] == ["3 recipes; turned round: none", "met"]
    assert goals["the same order on demo:other"] == [
        "3 recipes; turned round: `duquant-gptq`, `duquant-fast`",
        "**missed**",
    ]


def test_picture_is_xml_with_a_bar_for_each_recipe_and_whiskers_for_seeds(made: SimpleNamespace) -> None:
    root = ElementTree.fromstring(made.picture(made.sections([*ROWS, row("<odd & name>", 11.0)])))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<odd & name>" in texts
    assert "1.386, cut off" in texts
    assert "0.259 ± 0.077" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 3
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 1


def test_the_committed_page_and_picture_are_current(made: SimpleNamespace) -> None:
    rows = json.loads((BENCHMARKS / "results" / "accuracy.json").read_text())["rows"]
    results = BENCHMARKS.parent / "docs" / "results"
    command = "run: python benchmarks/accuracy.py --page"
    assert (results / "accuracy.md").read_text() == made.page(rows), command
    assert (results / "accuracy.svg").read_text() == made.picture(made.sections(rows)), command
