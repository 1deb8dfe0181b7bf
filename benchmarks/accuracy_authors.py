"""What the authors' code gives on the same model and windows, beside our rows: not measured here, but cited."""

import json
import math
from functools import cache
from typing import Any

from accuracy_rows import Section
from machine import RESULTS

_FILE = RESULTS / "authors-code.json"


def authors_table(section: Section) -> str:
    """Return a table for the section, or nothing where the authors' code was not run on its model and windows."""
    cited = _cited()
    if (section.model, section.evaluation) != (cited["model"], cited["evaluation"]):
        return ""
    ours = {entry.recipe: f"`{entry.recipe}`: {entry.loss:.3f}" for entry in section.entries if not entry.note}
    lines = [
        "### The authors' code",
        "",
        f"Measured {cited['measured']}, with {cited['code']}. Same windows and calibration; FP "
        f"{cited['fp_perplexity']}. It rounds queries, too, which we do not; where it leaves queries, keys and values "
        "in 16 bits, compare with `duquant-compat`.",
        "",
        "| method | D | perplexity | D of ours | D, Q, K and V in 16 bits | perplexity |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in cited["rows"]:
        both = (row["perplexity"], row["perplexity_without_qkv"])
        losses = [f"{math.log(perplexity / cited['fp_perplexity']):.3f}" for perplexity in both]
        cells = [losses[0], f"{both[0]:.2f}", ours.get(row["recipe"], ""), losses[1], f"{both[1]:.2f}"]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


@cache
def _cited() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found
