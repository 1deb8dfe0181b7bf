"""What the accuracy table has to show on SmolLM2-135M, beside what was measured."""

import json
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

from accuracy_rows import FP, Entry, Section
from machine import RESULTS

MODEL, TEXT, SEQ_LEN, WINDOWS = "demo:smollm2-135m", "wikitext2-test.txt", 2048, 16
"""Where the goals hold."""
_FAST, _LWC, _BEST = "duquant-fast", "duquant-lwc", "duquant-best"
_LOSSES = ((_FAST, 0.45), ("duquant", 0.62), (_LWC, 0.50), (_BEST, 0.28), (_BEST, 0.22))
_PASSES = 1.5
"""Forward passes over the calibration text that `duquant-fast` may take."""
_BEST_SECONDS = 600
_PIQA_POINTS = 1.5
_SPREAD = 0.10
"""Distance between the smallest and the largest D of a recipe's seeds, as a part of their mean."""


_LEVEL = 0.02
"""Recipes that are nearer have no order: another machine moves D as much."""


def goals_table(section: Section, sections: Sequence[Section]) -> str:
    """Return a table of the goals, with a verdict for each that was measured; nothing for other models and texts."""
    if (section.model, section.evaluation) != (MODEL, {"text": TEXT, "seq_len": SEQ_LEN, "windows": WINDOWS}):
        return ""
    entries = {entry.recipe: entry for entry in section.entries if not entry.note}
    lines = [
        "### Goals",
        "",
        "Set before the work began, for this model and text.",
        "",
        "| goal | measured | |",
        "| --- | --- | --- |",
        *(f"| {goal} | {measured} | {verdict} |" for goal, measured, verdict in _goals(entries)),
        *(f"| {goal} | {measured} | {verdict} |" for goal, measured, verdict in _orders(entries, section, sections)),
    ]
    return "\n".join([*lines, ""])


def _goals(entries: dict[str, Entry]) -> Iterator[tuple[str, str, str]]:
    for name, limit in _LOSSES:
        if entry := entries.get(name):
            aim = " (the aim)" if (name, limit) == _LOSSES[-1] else ""
            yield f"`{name}`: D at most {limit:.2f}{aim}", f"{entry.loss:.3f}", _verdict(entry.loss <= limit)
    if (ratio := _forward_passes()) is not None:
        goal = f"`{_FAST}`: calibration at most {_PASSES:g} times a plain forward pass over the same tokens"
        yield goal, f"{ratio:.2f}", _verdict(ratio <= _PASSES)
    if best := entries.get(_BEST):
        slowest = max(float(row["calibration_seconds"]) for row in best.rows)
        goal = f"`{_BEST}`: calibration in at most {_BEST_SECONDS // 60} minutes on 2 cores"
        yield goal, f"{slowest:.0f} s, the slowest seed", _verdict(slowest <= _BEST_SECONDS)
        yield from _answers(best, entries.get(FP))
    spreads = {name: spread for name, entry in entries.items() if (spread := _spread(entry)) is not None}
    if spreads:
        widest = max(spreads, key=lambda name: spreads[name])
        measured = f"{100 * spreads[widest]:.1f} % at most (`{widest}`), {len(spreads)} recipes"
        yield f"seeds change D by less than {100 * _SPREAD:.0f} %", measured, _verdict(spreads[widest] < _SPREAD)


def _answers(best: Entry, fp: Entry | None) -> Iterator[tuple[str, str, str]]:
    """Yield PIQA's goal, once for each score."""
    for score in ("acc_norm", "acc"):
        before, after = (_mean_score(entry, score) for entry in (fp, best))
        if before is None or after is None:
            continue
        lost = before - after
        goal = f"`{_BEST}`: PIQA, {score}, within {_PIQA_POINTS:g} points of the unquantized model"
        yield goal, f"{lost:.1f} points less", _verdict(lost <= _PIQA_POINTS)


def _orders(entries: dict[str, Entry], section: Section, sections: Sequence[Section]) -> Iterator[tuple[str, str, str]]:
    """Yield whether recipes stand in the same order on the unseen text, and on other models."""
    here = {name: entry.loss for name, entry in entries.items()}
    unseen = {name: statistics.fmean(entry.unseen_losses) for name, entry in entries.items() if entry.unseen_losses}
    yield from _order("the same order on the unseen text", here, unseen)
    for other in sections:
        if other is not section and other.model != section.model:
            there = {entry.recipe: entry.loss for entry in other.entries if not entry.note}
            yield from _order(f"the same order on {other.model}", here, there)


def _order(goal: str, first: dict[str, float], second: dict[str, float]) -> Iterator[tuple[str, str, str]]:
    """Yield the verdict over all pairs of recipes that are in both and level in neither."""
    names = [name for name in first if name in second and name != FP]
    pairs = [
        (one, two)
        for one, two in combinations(names, 2)
        if min(abs(losses[one] - losses[two]) for losses in (first, second)) > _LEVEL
    ]
    if not pairs:
        return
    turned = [f"`{one}`, `{two}`" for one, two in pairs if (first[one] < first[two]) != (second[one] < second[two])]
    found = f"{len(names)} recipes; turned round: {'; '.join(turned) or 'none'}"
    yield f"{goal}, of recipes that are {_LEVEL:g} apart", found, _verdict(not turned)


def _mean_score(entry: Entry | None, score: str) -> float | None:
    found = [100 * row["piqa"][score] for row in entry.rows if "piqa" in row] if entry else []
    return statistics.fmean(found) if found else None


def _spread(entry: Entry) -> float | None:
    """Return how far the seeds' D are from each other, as a part of the mean; nothing for one seed."""
    return (max(entry.losses) - min(entry.losses)) / entry.loss if len(entry.losses) > 1 else None


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


@cache
def _forward_passes() -> float | None:
    file = RESULTS / "quantize-fast.json"
    if not file.exists():
        return None
    ratio: float = json.loads(file.read_text(encoding="utf-8"))["recipes"][_FAST]["ratio_to_plain_forward"]
    return ratio
