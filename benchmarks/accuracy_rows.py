"""The rows of benchmarks/results/accuracy.json, sorted into what can be compared and what can be averaged."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duquant.config import ALGORITHM_VERSION, PRESETS

FP = "fp"
"""The unquantized model's row."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """Rows of one recipe that differ in their seeds alone."""

    recipe: str
    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    """D = ln(perplexity / the unquantized model's) of each seed; none for that model, and where it is missing."""
    unseen_losses: tuple[float, ...] = ()
    """D on the text that nothing was tuned on, of the seeds that have it."""

    @property
    def loss(self) -> float:
        """Return the mean of D: 0 for the unquantized model, and inf where it cannot be said."""
        return statistics.fmean(self.losses) if self.losses else 0.0 if self.recipe == FP else math.inf

    @property
    def bits(self) -> str:
        """Return the bits of weights, activations and KV cache, such as W4A4KV4; empty for a recipe that is gone."""
        if self.recipe == FP:
            return "W16A16KV16"
        if self.recipe not in PRESETS:
            return ""
        recipe = PRESETS[self.recipe][1]
        return f"W{recipe.weight.bits}A{recipe.activation.bits}KV{recipe.kv_cache.bits}"

    @property
    def rounds_weights_alone(self) -> bool:
        """Whether activations stay in 16 bits: the row does not compete with those that round them."""
        return self.recipe in PRESETS and PRESETS[self.recipe][1].activation.bits >= 16

    @property
    def note(self) -> str:
        """Return what the rows were measured with, where a measurement of today would be another; else nothing."""
        return outdated(self.rows[0])


@dataclass(frozen=True)
class Section:
    """What can be compared: one model on the same windows of the same text.

    The unquantized model comes first, then the best entry; those that round weights alone stand last.
    """

    model: str
    evaluation: Row
    entries: tuple[Entry, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the rows of all entries."""
        return tuple(row for entry in self.entries for row in entry.rows)


def sections(rows: Sequence[Row]) -> list[Section]:
    """Sort rows into sections, in the order in which they first appear."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        places.setdefault(_key(row, ("model", "evaluation")), []).append(row)
    return [Section(same[0]["model"], same[0]["evaluation"], tuple(_entries(same))) for same in places.values()]


def outdated(row: Row) -> str:
    """Say what a row was measured with, where the recipe of its name or the algorithm are others by now."""
    if row["recipe"] == FP:
        return ""
    if row["recipe"] not in PRESETS:
        return "a recipe that is gone"
    was = []
    if row["recipe_digest"] != PRESETS[row["recipe"]][1].digest():
        was.append("an earlier form of the recipe")
    if row["algorithm_version"] != ALGORITHM_VERSION:
        was.append(f"version {row['algorithm_version']} of the algorithm")
    return ", ".join(was)


def _entries(rows: Sequence[Row]) -> list[Entry]:
    fp = next((row for row in rows if row["recipe"] == FP), None)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        # Seeds that were measured by other recipes of the same name, or by another algorithm, have no mean together.
        groups.setdefault(_key(row, ("recipe", "recipe_digest", "algorithm_version", "calibration")), []).append(row)
    entries = []
    for group in groups.values():
        recipe = group[0]["recipe"]
        seeds = tuple(sorted(group, key=lambda row: int(row["seed"])))
        base = fp if fp is not None and recipe != FP else {}
        unseen = [row["unseen"] for row in seeds if "unseen" in row]
        entries.append(Entry(recipe, seeds, _losses(seeds, base), _losses(unseen, base.get("unseen", {}))))
    today = {entry.recipe for entry in entries if not entry.note}
    shown = [entry for entry in entries if not entry.note or entry.recipe not in today]
    return sorted(shown, key=lambda entry: (entry.recipe != FP, entry.rounds_weights_alone, entry.loss, entry.recipe))


def _losses(rows: Iterable[Row], fp: Row) -> tuple[float, ...]:
    return tuple(math.log(row["perplexity"] / fp["perplexity"]) for row in rows) if fp else ()


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row.get(name) for name in names], sort_keys=True)
