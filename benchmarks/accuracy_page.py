"""Writes docs/results/accuracy.md and its picture from the rows of benchmarks/results/accuracy.json."""

import statistics
from collections.abc import Sequence

from accuracy_authors import authors_table
from accuracy_picture import picture
from accuracy_rows import FP, Entry, Row, Section, sections
from machine import REPOSITORY

from duquant.config import ALGORITHM_VERSION, PRESETS

FOLDER = REPOSITORY / "docs" / "results"

_HEAD = """# Accuracy

Written by `make bench-accuracy` from `benchmarks/results/accuracy.json`; not to be edited by hand.

Perplexity over consecutive windows of the test text (for Gemma they start with BOS); weights, activations and KV cache
as the recipe has them. D = ln(perplexity / perplexity of the unquantized model). Mean over seeds ± half the distance
between the smallest and the largest. No recipe was chosen on this text.
D, unseen: the same on quotations from Debian's package `fortunes`, which no recipe was tuned on or calibrated with.
PIQA: zero-shot through lm-eval, acc_norm and acc in percent ± the larger of half the distance between seeds and one
standard error over the questions.
Bits per weight: all that is stored of the quantized linears, transforms and scales with it. The blocks of
`duquant-best` and `duquant-distilled` weigh much beside the narrow layers of these models, and less the wider a model
is ([balanced blocks](../explanation/balance.md)).
What each recipe is: [recipes](../reference/config.md), [the family](../explanation/family.md). One that a model's table
lacks is refused by it, or not measured yet; those that keep activations in 16 bits stand last.

![degradation by recipe](accuracy.svg)
"""
_COLUMNS = (
    ("recipe", "---"),
    ("rounded to", "---"),
    ("D", "---:"),
    ("perplexity", "---:"),
    ("D, unseen", "---:"),
    ("PIQA, acc_norm", "---:"),
    ("PIQA, acc", "---:"),
    ("questions", "---:"),
    ("seeds", "---:"),
    ("bits per weight", "---:"),
    ("calibration", "---:"),
    ("peak memory", "---:"),
    ("machine", "---"),
    ("commit", "---"),
)
_BUSY = 1.5
"""Load at the start of a row from which its time is an upper bound: another process takes one of two cores."""


def write_page(rows: Sequence[Row]) -> None:
    """Write the page and the picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "accuracy.md").write_text(page(rows), encoding="utf-8")
    (FOLDER / "accuracy.svg").write_text(picture(sections(rows)), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Return the page in Markdown."""
    tables = (table for section in sections(rows) for table in (_table(section), authors_table(section)) if table)
    return "\n".join([_HEAD, *tables])


def _table(section: Section) -> str:
    evaluation, rows = section.evaluation, section.rows
    machines = sorted({_machine(row) for row in rows})
    lines = [
        f"## {section.model}",
        "",
        f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['seq_len']} tokens.",
        "",
        _line([name for name, _ in _COLUMNS]),
        _line([alignment for _, alignment in _COLUMNS]),
        *(_line(_cells(entry, machines)) for entry in section.entries),
        "",
    ]
    texts = {_calibration(row) for row in rows if "calibration" in row}
    if texts:
        lines.append(f"Calibration: {'; '.join(sorted(texts))}.")
    lines += [told for entry in section.entries if (told := _mixture(entry))]
    dates = [row["date"] for row in rows]
    when = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
    numbered = "; ".join(f"{number}: {machine}" for number, machine in enumerate(machines, 1))
    lines += [
        f"Machine: {numbered}. Measured {when}.",
        f"≤ marks times of a busy machine (a load above {_BUSY} at the start), a star a commit with changes that were "
        "not committed.",
    ]
    if any(entry.note for entry in section.entries):
        lines.append(
            "Rows with a note were measured before the recipe or the algorithm changed (today's version is "
            f"{ALGORITHM_VERSION}); they stay until they are measured again."
        )
    return "\n".join([*lines, ""])


def _cells(entry: Entry, machines: Sequence[str]) -> list[str]:
    rows = entry.rows
    name = "FP (bfloat16)" if entry.recipe == FP else f"`{entry.recipe}`"
    seconds = [row["calibration_seconds"] for row in rows if "calibration_seconds" in row]
    peaks = [row["peak_rss_bytes"] for row in rows if "peak_rss_bytes" in row]
    commits = dict.fromkeys(row["commit"][:7] + ("*" if row["has_uncommitted_changes"] else "") for row in rows)
    bound = "≤ " if any(row["load_at_start"] > _BUSY for row in rows) else ""
    questions = sorted({row["piqa"]["samples"] for row in rows if "piqa" in row})
    return [
        f"{name} ({entry.note})" if entry.note else name,
        entry.bits,
        "0" if entry.recipe == FP else _spread(entry.losses, 3),
        _spread([row["perplexity"] for row in rows], 2),
        "0" if entry.recipe == FP and "unseen" in rows[0] else _spread(entry.unseen_losses, 3),
        _piqa(rows, "acc_norm"),
        _piqa(rows, "acc"),
        ", ".join(f"{count:,}" for count in questions),
        str(len(rows)),
        f"{rows[0]['bits_per_weight']:.2f}",
        f"{bound}{statistics.fmean(seconds):.0f} s" if seconds else "",
        f"{max(peaks) / 2**20:.0f} MiB" if peaks else "",
        ", ".join(dict.fromkeys(str(machines.index(_machine(row)) + 1) for row in rows)),
        ", ".join(commits),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _calibration(row: Row) -> str:
    sizes = row["calibration"]
    return f"{sizes['samples']} windows of {sizes['seq_len']} tokens of {sizes['text']}"


def _machine(row: Row) -> str:
    return f"{row['machine']['cpu']}, {row['machine']['cores']} cores"


def _mixture(entry: Entry) -> str:
    """Say which part of the windows is of other texts; nothing where all are of the calibration's."""
    if entry.note or entry.recipe not in PRESETS:
        return ""
    calibration = PRESETS[entry.recipe][1].calibration
    shares = [
        f"{100 * share:.0f} % {text}"
        for share, text in (
            (calibration.builtin_share, "of the text that ships with Python"),
            (calibration.conversation_share, "of `builtin:conversations`"),
            (calibration.self_share, "written by the model"),
        )
        if share
    ]
    return f"Of the windows of `{entry.recipe}`, {' and '.join(shares)}." if shares else ""


def _piqa(rows: Sequence[Row], score: str) -> str:
    """Return a score in percent, of the rows that have it."""
    measured = [row["piqa"] for row in rows if "piqa" in row]
    if not measured:
        return ""
    values = [100 * scores[score] for scores in measured]
    error = max((max(values) - min(values)) / 2, *(100 * (scores[f"{score}_stderr"] or 0) for scores in measured))
    return f"{statistics.fmean(values):.2f} ± {error:.2f}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")
