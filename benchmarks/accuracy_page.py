"""Writes docs/results/accuracy.md and its picture from the rows of benchmarks/results/accuracy.json."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from accuracy_authors import authors_table
from accuracy_goals import goals_table
from accuracy_picture import picture
from accuracy_rows import FP, Entry, Row, Section, sections
from machine import REPOSITORY

from duquant.config import ALGORITHM_VERSION, PRESETS

FOLDER = REPOSITORY / "docs" / "results"

_HEAD = """# Accuracy

Written by `make bench-accuracy` from `benchmarks/results/accuracy.json`; not to be edited by hand.

- **D** = ln(perplexity / perplexity of the unquantized model), over consecutive windows of the test text (for Gemma
  they start with BOS); mean over seeds ± half the distance between the smallest and the largest.
- **D, unseen**: the same on quotations from Debian's package `fortunes`, which are in no calibration. Where fewer seeds
  have it, their number stands beside it.
- **Bits per weight**: all that is stored of the quantized linears, transforms and scales with it. The blocks of
  `duquant-best` and `duquant-distilled` weigh much beside the narrow layers of these models, and less the wider a
  model is: about 5 bits at a width of 4,096 ([balanced blocks](../explanation/balance.md)).
- **Calibration**: seconds from the smallest to the largest of the seeds; ≤ where the machine was busy (a load above 1.5
  at the start). **Peak memory**: of the process.

Recipes are chosen on the calibration text, by the half that calibration does not see; what stands here is reported
([what was chosen by what](../explanation/choices.md)). The machine moves D as well: `duquant` with seed 0 had 0.522 on
a Xeon with AMX at commit 268e65f and 0.506 on an EPYC at b09a5fa, so recipes that are nearer than 0.02 have no order.

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
    ("seeds", "---:"),
    ("bits per weight", "---:"),
    ("calibration", "---:"),
    ("peak memory", "---:"),
)
_ANSWERS = (
    ("recipe", "---"),
    ("acc_norm", "---:"),
    ("less than FP", "---:"),
    ("acc", "---:"),
    ("less than FP", "---:"),
    ("seeds", "---:"),
)
_RUNS = (("recipe", "---"), ("machine", "---"), ("threads", "---"), ("measured", "---"), ("commit", "---"))
_BUSY = 1.5
"""Load at the start of a row from which its time is an upper bound: another process takes one of two cores."""


def write_page(rows: Sequence[Row]) -> None:
    """Write the page and the picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "accuracy.md").write_text(page(rows), encoding="utf-8")
    (FOLDER / "accuracy.svg").write_text(picture(sections(rows)), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Return the page in Markdown."""
    found = sections(rows)
    goals = [table for section in found if (table := goals_table(section, found))]
    return "\n".join([_HEAD, *goals, *(part for section in found for part in _parts(section) if part)])


def _parts(section: Section) -> Iterator[str]:
    evaluation = section.evaluation
    yield f"## {section.model}\n"
    yield f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['seq_len']} tokens.\n"
    yield _table(_COLUMNS, (_cells(entry) for entry in section.entries))
    texts = {_calibration(row) for row in section.rows if "calibration" in row}
    notes = [f"Calibration: {'; '.join(sorted(texts))}."] if texts else []
    notes += [told for entry in section.entries if (told := _mixture(entry))]
    if any(entry.note for entry in section.entries):
        notes.append(
            "Rows with a note were measured before the recipe or the algorithm changed (today's version is "
            f"{ALGORITHM_VERSION}); they stay until they are measured again."
        )
    yield "\n".join([*notes, ""])
    yield _answers(section)
    yield authors_table(section)
    yield "### Where and when\n"
    machines = sorted({_machine(row) for row in section.rows})
    yield _table(_RUNS, (_run(entry, machines) for entry in section.entries))
    numbered = "; ".join(f"{number}: {machine}" for number, machine in enumerate(machines, 1))
    legend = [f"Machine: {numbered}."]
    if any(row["has_uncommitted_changes"] for row in section.rows):
        legend.append("A star marks a commit with changes that were not committed.")
    yield "\n".join([*legend, ""])


def _cells(entry: Entry) -> list[str]:
    rows = entry.rows
    peaks = [row["peak_rss_bytes"] for row in rows if "peak_rss_bytes" in row]
    unseen = _spread(entry.unseen_losses, 3)
    if 0 < len(entry.unseen_losses) < len(rows):
        unseen += f" ({len(entry.unseen_losses)} seed{'s' if len(entry.unseen_losses) > 1 else ''})"
    return [
        _name(entry),
        entry.bits,
        "0" if entry.recipe == FP else _spread(entry.losses, 3),
        _spread([row["perplexity"] for row in rows], 2),
        "0" if entry.recipe == FP and "unseen" in rows[0] else unseen,
        str(len(rows)),
        f"{rows[0]['bits_per_weight']:.2f}",
        _seconds(rows),
        f"{max(peaks) / 2**20:.0f} MiB" if peaks else "",
    ]


def _answers(section: Section) -> str:
    """Return the table of PIQA's scores, or nothing where no row has them."""
    asked = [entry for entry in section.entries if any("piqa" in row for row in entry.rows)]
    if not asked:
        return ""
    counts = sorted({row["piqa"]["samples"] for entry in asked for row in entry.rows if "piqa" in row})
    fp = asked[0] if asked[0].recipe == FP else None
    return (
        "### PIQA\n\n"
        f"Zero-shot through lm-eval, {' and '.join(f'{count:,}' for count in counts)} questions, in percent; mean "
        "over\nseeds ± the larger of half the distance between seeds and one standard error over the questions.\n"
        "[What moves the answers](../explanation/answers.md).\n\n"
        + _table(_ANSWERS, (_scores(entry, fp) for entry in asked))
    )


def _scores(entry: Entry, fp: Entry | None) -> list[str]:
    cells = [_name(entry)]
    for score in ("acc_norm", "acc"):
        values = _percents(entry, score)
        errors = [100 * (row["piqa"][f"{score}_stderr"] or 0) for row in entry.rows if "piqa" in row]
        error = max((max(values) - min(values)) / 2, *errors)
        less = f"{statistics.fmean(_percents(fp, score)) - statistics.fmean(values):.1f}" if fp and fp != entry else ""
        cells += [f"{statistics.fmean(values):.2f} ± {error:.2f}", less]
    return [*cells, str(len(_percents(entry, "acc")))]


def _percents(entry: Entry, score: str) -> list[float]:
    return [100 * row["piqa"][score] for row in entry.rows if "piqa" in row]


def _run(entry: Entry, machines: Sequence[str]) -> list[str]:
    rows = entry.rows
    commits = dict.fromkeys(row["commit"][:7] + ("*" if row["has_uncommitted_changes"] else "") for row in rows)
    threads = dict.fromkeys(str(row["machine"].get("threads", "not recorded")) for row in rows)
    return [
        _name(entry),
        ", ".join(dict.fromkeys(str(machines.index(_machine(row)) + 1) for row in rows)),
        ", ".join(threads),
        ", ".join(sorted({row["date"] for row in rows})),
        ", ".join(commits),
    ]


def _name(entry: Entry) -> str:
    name = "FP (bfloat16)" if entry.recipe == FP else f"`{entry.recipe}`"
    return f"{name} ({entry.note})" if entry.note else name


def _seconds(rows: Sequence[Row]) -> str:
    """Return the shortest and the longest calibration."""
    seconds = sorted(round(row["calibration_seconds"]) for row in rows if "calibration_seconds" in row)
    if not seconds:
        return ""
    bound = "≤ " if any(row["load_at_start"] > _BUSY for row in rows) else ""
    return bound + " to ".join(dict.fromkeys((str(seconds[0]), str(seconds[-1])))) + " s"


def _table(columns: Sequence[tuple[str, str]], lines: Iterable[Sequence[str]]) -> str:
    head = [_line([name for name, _ in columns]), _line([alignment for _, alignment in columns])]
    return "\n".join([*head, *map(_line, lines), ""])


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


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")
