"""What benchmarks/other_texts.py measures: presets with another damping, and PIQA as it is asked."""

import importlib
import json
import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from duquant.config import preset

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def other_texts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("other_texts")
    for name in ("other_texts", "row_file", "quantize", "machine"):
        monkeypatch.delitem(sys.modules, name)
    return module


def test_only_the_damping_differs(other_texts: ModuleType) -> None:
    found, recipe = other_texts.variant("duquant-gptq", 0.125), preset("duquant-gptq")
    assert found.weight.damp == 0.125
    assert replace(found, weight=recipe.weight) == recipe
    assert other_texts.variant("rtn") == preset("rtn")


def test_only_the_windows_differ(other_texts: ModuleType) -> None:
    recipe = preset("duquant-distilled")
    assert recipe.calibration.builtin_share > 0
    for mix in ({}, {"conversation_share": 0.5, "self_share": 0.25}):
        found = other_texts.variant("duquant-distilled", mix=mix)
        assert {name: share for name in other_texts.SHARES if (share := getattr(found.calibration, name))} == mix
        assert replace(found, calibration=recipe.calibration) == recipe


def test_rows_name_the_shares_of_other_texts(other_texts: ModuleType) -> None:
    names = ["duquant-fast", "duquant-distilled", "duquant-gptq", "duquant-best"]
    arguments = Namespace(model="m", recipe=names, damp=None, mix=None, samples=2, seq_len=16, windows=1)
    mixes = {(row["recipe"], row["damp"]): row.get("mix") for row in other_texts._planned(arguments, "valid")}
    assert mixes["duquant-fast", None] is None
    assert mixes["duquant-distilled", None] == {"builtin_share": 0.5}
    assert mixes["duquant-best", 0.3] is None
    assert mixes["duquant-gptq", 0.3] is None


def test_one_mixture_alone_can_be_measured(other_texts: ModuleType) -> None:
    mix = other_texts._mix("conversation=0.5,self=0.25")
    assert mix == {"conversation_share": 0.5, "self_share": 0.25}
    arguments = Namespace(model="m", recipe=["duquant"], damp=None, mix=[mix], samples=2, seq_len=16, windows=1)
    assert [row.get("mix") for row in other_texts._planned(arguments, "valid")] == [None, mix]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wiki=1", "no 'wiki'; there is: builtin, conversation, self"),
        ("builtin", "'builtin' is not NAME=SHARE"),
        ("builtin=half", "'builtin=half' is not NAME=SHARE"),
        ("builtin=0.6,self=0.6", "together they must be at most 1"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_anything_is_measured(
    other_texts: ModuleType, text: str, said: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=said):
        other_texts._mix(text)


def test_questions_have_their_right_answers(other_texts: ModuleType) -> None:
    rows = [
        {"goal": "Cut bread?", "sol1": "A knife.", "sol2": "A spoon.", "label": 0},
        {"goal": "Eat soup?", "sol1": "A fork.", "sol2": "A spoon.", "label": 1},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    asked = "Question: Cut bread?\nAnswer: A knife.\n\nQuestion: Eat soup?\nAnswer: A spoon."
    assert other_texts.questions_with_answers(lines) == asked
