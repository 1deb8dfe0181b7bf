"""The rows of benchmarks/results/accuracy.json, sorted into what can be compared and what can be averaged."""

import json
import math
import statistics
from collections.abc import Sequence
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
    def note(self) -> str:
        """Return what the rows were measured with, where a measurement of today would be another; else nothing."""
        return outdated(self.rows[0])


@dataclass(frozen=True)
class Section:
    """What can be compared: one model on the same windows of the same text. The best entry comes first."""

    model: str
    evaluation: Row
    entries: tuple[Entry, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the rows of all entries."""
        return tuple(row for entry in self.entries for row in entry.rows)


def sections(rows: Sequence[Row]) -> list[Section]:
    """Sort rows into sections, in the order in which they first appear."""
    places = {_key(row, ("model", "evaluation")): row for row in reversed(rows)}
    found = []
    for place, first in reversed(places.items()):
        members = [row for row in rows if _key(row, ("model", "evaluation")) == place]
        found.append(Section(first["model"], first["evaluation"], tuple(_entries(members))))
    return found


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
    fp = next((row["perplexity"] for row in rows if row["recipe"] == FP), None)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        # Seeds that were measured by other recipes of the same name, or by another algorithm, have no mean together.
        groups.setdefault(_key(row, ("recipe", "recipe_digest", "algorithm_version", "calibration")), []).append(row)
    entries = []
    for group in groups.values():
        recipe = group[0]["recipe"]
        losses = () if fp is None or recipe == FP else tuple(math.log(row["perplexity"] / fp) for row in group)
        entries.append(Entry(recipe, tuple(sorted(group, key=lambda row: int(row["seed"]))), losses))
    return sorted(entries, key=lambda entry: (entry.recipe != FP, entry.loss, entry.recipe))


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row.get(name) for name in names], sort_keys=True)
