"""Tables that take long: rows are planned, those that are missing are measured, and each is written at once."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe, load_average
from quantize import run_duquant

from duquant.config import Recipe
from duquant.models.references import resolve_model

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """The rows of a benchmark, `{"rows": [...]}` in a JSON file; an interrupted run goes on where it was."""

    path: Path
    place: tuple[str, ...]
    """Fields that say which row of the table it is: a newer measurement takes the place of an older one."""
    identity: tuple[str, ...]
    """Fields that say what it was measured with: a row with other ones is measured again."""

    def read(self) -> list[Row]:
        """Return the rows, none when there is no file."""
        rows: list[Row] = json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []
        return rows

    def measure(
        self, planned: Iterable[Row], measure: Callable[[Row], Row], *, lacks: Callable[[Row], str] = lambda _row: ""
    ) -> list[Row]:
        """Measure the planned rows that are missing, and return all rows.

        Several runs may share the file.

        Args:
            planned: what identifies each row.
            measure: returns the fields that a planned row gets.
            lacks: says what a row that was measured before is without, to be measured again with; nothing if nothing.
        """
        rows = self.read()
        facts = {"command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])}
        for plan in planned:
            before = next((row for row in rows if self._same(row, plan, (*self.place, *self.identity))), None)
            if before is not None and not (lacking := lacks(before)):
                print(f"{self._label(plan)}: measured before", flush=True)
                continue
            if before is not None:
                print(f"{self._label(plan)}: measured before without {lacking}, so measured again", flush=True)
            state = {**describe(), **facts, "load_at_start": load_average()}
            row = {**plan, **state, **measure(plan)}
            # Read again: measuring takes long, and another run may have written meanwhile.
            rows = self._with(self.read(), row)
            self._write(rows)
            print(f"{self._label(row)}: {_told(row)}", flush=True)
        return rows

    def _with(self, rows: Sequence[Row], new: Row) -> list[Row]:
        """Return the rows with the new one where an older one of its place was, else at the end."""
        where = next((index for index, row in enumerate(rows) if self._same(row, new, self.place)), len(rows))
        return [*rows[:where], new, *rows[where + 1 :]]

    def _write(self, rows: Sequence[Row]) -> None:
        """Write all rows, or leave the file as it is."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
        part.replace(self.path)

    @staticmethod
    def _same(row: Row, other: Row, names: Iterable[str]) -> bool:
        return all(row.get(name) == other.get(name) for name in names)

    def _label(self, row: Row) -> str:
        """Return a row's place in words, such as `demo:smollm2-135m duquant-best seed 0`."""
        given = {name: row[name] for name in self.place if row.get(name) is not None}
        return " ".join(
            str(value) if name in ("model", "recipe") else f"{name} {value}" for name, value in given.items()
        )


def _told(row: Row) -> str:
    found = row["perplexity"]
    texts = found if isinstance(found, Mapping) else {"": found}
    told = ["perplexity " + ", ".join(f"{text} {value:.3f}".strip() for text, value in texts.items())]
    if "piqa" in row:
        told.append(f"PIQA {row['piqa']['acc_norm']:.4f}")
    if "calibration_seconds" in row:
        told.append(f"{row['calibration_seconds']} s")
    return "; ".join(told)


@contextmanager
def quantized(model: str, recipe: Recipe, calibration: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, Row]]:
    """Quantize a model; yield the artifact's folder, which is gone afterwards, and what it cost.

    Args:
        model: a reference, such as demo:smollm2-135m.
        recipe: what to do.
        calibration: a text file.
        sizes: `samples` windows of `seq_len` tokens.
    """
    # Converting a model once takes more memory than quantizing it, and is not what is measured.
    resolve_model(model)
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "recipe.json", Path(folder) / "artifact"
        file.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        made = run_duquant(
            *("quantize", model, "--recipe", str(file), "--calibration", calibration),
            *("--samples", str(sizes["samples"]), "--seq-len", str(sizes["seq_len"]), "--out", str(out)),
        )
        summary = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["summary"]
        cost = {
            "layers": made["layers"],
            "bits_per_weight": summary["bits_per_weight"],
            "calibration_seconds": round(made["seconds"], 1),
            "peak_rss_bytes": made["peak_rss_bytes"],
        }
        yield str(out), cost


def evaluate(model: str, text: str, sizes: Mapping[str, Any], *options: str) -> Row:
    """Return what `duquant eval` finds on `windows` windows of `seq_len` tokens of a text."""
    size_options = ("--seq-len", str(sizes["seq_len"]), "--windows", str(sizes["windows"]))
    return run_duquant("eval", model, "--text", text, *size_options, *options)


def perplexities(model: str, texts: Mapping[str, str], sizes: Mapping[str, Any]) -> dict[str, float]:
    """Return the perplexity on each of several texts."""
    return {use: evaluate(model, text, sizes)["perplexity"] for use, text in texts.items()}
