"""The results in README.md: today's recipes on the first model of benchmarks/results/accuracy.json, the best first."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured_rows import is_earlier, machines_of

from duquant.config import preset

_FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
_SHOWN = ("duquant-distilled", "duquant-best", "duquant-gptq", "duquant-fast", "duquant", "quarot", "rtn")
"""All round weights, activations and KV cache to 4 bits."""


def results_section() -> str:
    """Return what stands between the markers in README.md."""
    file = _FOLDER / "accuracy.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    fp = next((row for row in rows if row["recipe"] == "fp"), None)
    if fp is None:
        return "The benchmark has not been run yet: `make bench-accuracy`."
    found = [(name, [row for row in rows if _is_of(row, name, fp)]) for name in _SHOWN]
    measured = sorted((entry for entry in found if entry[1]), key=lambda entry: _loss(entry[1], fp))
    evaluation = fp["evaluation"]
    lines = [
        "| | perplexity | D | bits per weight | calibration |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| FP (bfloat16) | {fp['perplexity']:.2f} | 0 | 16.00 | |",
        *(_line(name, members, fp) for name, members in measured),
        "",
        f"`{fp['model']}`, W4A4 with a 4-bit KV cache; {evaluation['windows']} windows of {evaluation['seq_len']} "
        f"tokens of `{evaluation['text']}`; D = ln(PPL / PPL of FP). Times are of the slowest seed, some of them "
        f"on busy machines ({machines_of(row for _, same in measured for row in same)}). {' '.join(_passes())}",
        "",
        "Bits per weight count everything that is stored. The blocks of `duquant-best` and `duquant-distilled` weigh "
        "much beside layers as narrow as this model's; at a width of 4,096 they come to about 5 bits.",
        "",
        "Goals and what is missed of them, every method of the family, seeds, PIQA and a second model: "
        "[accuracy](docs/results/accuracy.md).",
    ]
    return "\n".join(lines)


def _is_of(row: dict[str, Any], name: str, fp: dict[str, Any]) -> bool:
    """Whether a row is a measurement of today's recipe of that name, comparable with the unquantized model's."""
    if row["recipe"] != name or is_earlier(row, preset(name)):
        return False
    return bool((row["model"], row["evaluation"]) == (fp["model"], fp["evaluation"]))


def _loss(rows: list[dict[str, Any]], fp: dict[str, Any]) -> float:
    return statistics.fmean(math.log(row["perplexity"] / fp["perplexity"]) for row in rows)


def _line(name: str, rows: list[dict[str, Any]], fp: dict[str, Any]) -> str:
    perplexity = statistics.fmean(row["perplexity"] for row in rows)
    seconds = max(row["calibration_seconds"] for row in rows)
    bits = rows[0]["bits_per_weight"]
    return f"| `{name}` | {perplexity:.2f} | {_loss(rows, fp):.3f} | {bits:.2f} | {seconds:.0f} s |"


def _passes() -> Iterator[str]:
    """Say what the default recipe's calibration costs beside a plain forward pass, where that was measured."""
    file = _FOLDER / "quantize-fast.json"
    if not file.exists():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    for name, entry in values["recipes"].items():
        yield (
            f"On an idle {values['machine']['cpu']} `{name}` took {entry['seconds']:.0f} s, "
            f"{entry['ratio_to_plain_forward']:.2f} times a plain bfloat16 forward pass over the calibration text."
        )
