"""The measured part of a model card."""

from typing import Any

from duquant.artifact.card_measures import measured

RESULT: dict[str, Any] = {
    "measured_at": "2026-11-22T12:00:00+00:00",
    "device": "cpu",
    "text": {"kind": "file", "name": "wiki.txt", "part": "all"},
    "windows": 16,
    "seq_len": 2048,
    "perplexity": 15.0,
}


def test_a_number_stands_with_its_text_windows_device_and_date() -> None:
    assert measured({"results": [RESULT]}).splitlines() == [
        "| perplexity | text | windows | device | date |",
        "| --- | --- | --- | --- | --- |",
        "| 15.0000 | file `wiki.txt` | 16 of 2048 tokens | cpu | 2026-11-22 |",
    ]


def test_the_unquantized_model_stands_beside_it_where_it_is_known() -> None:
    card = measured({"results": [{**RESULT, "baseline": {"perplexity": 10.0}}, RESULT]})
    assert "| 15.0000 | 10.0000 | +50.0% |" in card
    assert "| 15.0000 |  |  |" in card


def test_tasks_have_errors_and_speed_is_of_the_artifact() -> None:
    scores = {"acc": 0.5, "acc_stderr": 0.1, "samples": 25, "num_fewshot": 0, "seconds": 1.0}
    speed = {"scope": "model", "phase": "decode", "batch": 16, "tokens": 16, "tokens_per_second": 123.4, "speedup": 1.5}
    card = measured({"results": [{"device": "cpu", "tasks": {"piqa": scores}, "speed": [speed]}]})
    assert "| `piqa` | acc | 0.5000 ± 0.1000 | 25 | 0 | cpu |" in card
    assert "| whole model | decode, batch 16 | 123.4 | 1.50x | cpu |" in card
    assert "perplexity" not in card


def test_a_gate_is_shown_with_its_limits() -> None:
    check = {"check": "perplexity increase", "limit": "at most 50.0%", "value": 0.253, "passed": True}
    assert "| perplexity increase | at most 50.0% | 25.3% |" in measured({"quality_gate": {"checks": [check]}})


def test_names_of_texts_cannot_end_a_cell_or_a_row() -> None:
    name = "a|b\n# Heading `x`"
    card = measured({"results": [{**RESULT, "text": {"kind": "file", "name": name}}]})
    assert len(card.splitlines()) == 3
    assert "`a\\|b # Heading 'x'`" in card
