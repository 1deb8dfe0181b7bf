"""Writes docs/results/accuracy.md and its picture from the rows of benchmarks/results/accuracy.json."""

import math
import statistics
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from machine import REPOSITORY

FOLDER = REPOSITORY / "docs" / "results"
_BAR, _GAP, _LABELS, _WIDTH = 18, 8, 190, 720
_LARGEST_D = 1.0
"""Longer bars are cut off: baselines would make all others too short to compare."""


def write_page(rows: Sequence[dict[str, Any]]) -> None:
    """Write the page and the picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "accuracy.md").write_text(page(rows), encoding="utf-8")
    (FOLDER / "accuracy.svg").write_text(picture(rows), encoding="utf-8")


def losses(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Return D = ln(perplexity / FP's) of every seed, by (model, recipe)."""
    fp = {(row["model"], str(row["evaluation"])): row["perplexity"] for row in rows if row["recipe"] == "fp"}
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        reference = fp.get((row["model"], str(row["evaluation"])))
        if row["recipe"] != "fp" and reference is not None:
            found.setdefault((row["model"], row["recipe"]), []).append(math.log(row["perplexity"] / reference))
    return found


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page in Markdown."""
    lines = [
        "# Accuracy",
        "",
        "Written by `make bench-accuracy` from `benchmarks/results/accuracy.json`; not to be edited by hand.",
        "",
        "Perplexity over consecutive windows of the test text (for Gemma they start with BOS); weights, activations",
        "and KV cache as the recipe has them. D = ln(perplexity / perplexity of the unquantized model). Mean over",
        "seeds ± half the distance between the smallest and the largest. No recipe was chosen on this text.",
        "PIQA: zero-shot through lm-eval, acc_norm and acc in percent ± the larger of half the distance between seeds",
        "and one standard error over the questions.",
        "",
        "![degradation by recipe](accuracy.svg)",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += _table(model, [row for row in rows if row["model"] == model])
    return "\n".join(lines)


def _table(model: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    evaluation = rows[0]["evaluation"]
    lines = [
        f"## {model}",
        "",
        f"{evaluation['text']}, {evaluation['windows']} windows of {evaluation['seq_len']} tokens.",
        "",
        "| recipe | perplexity | D | PIQA | its acc | seeds | bits per weight | calibration | peak memory | commit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    by_recipe = losses(rows)
    order = sorted({row["recipe"] for row in rows}, key=lambda name: _mean(by_recipe.get((model, name), [0.0])))
    for name in order:
        seeds = [row for row in rows if row["recipe"] == name]
        loss = by_recipe.get((model, name), [])
        seconds = [row["calibration_seconds"] for row in seeds if "calibration_seconds" in row]
        peak = [row["peak_rss_bytes"] for row in seeds if "peak_rss_bytes" in row]
        # An older row stays until it is measured again; a mark says so where the code had changed since its commit.
        commits = sorted({row["commit"][:7] + ("*" if row["has_uncommitted_changes"] else "") for row in seeds})
        lines.append(
            f"| {'FP (bfloat16)' if name == 'fp' else f'`{name}`'} | {_spread([r['perplexity'] for r in seeds], 2)} "
            f"| {_spread(loss, 3) if loss else '0'} | {_piqa(seeds, 'acc_norm')} | {_piqa(seeds, 'acc')} "
            f"| {len(seeds)} | {seeds[0]['bits_per_weight']:.2f} "
            f"| {f'{_mean(seconds):.0f} s' if seconds else ''} | {f'{max(peak) / 2**20:.0f} MiB' if peak else ''} "
            f"| {', '.join(commits)} |"
        )
    lines.append("")
    calibration = next((row["calibration"] for row in rows if "calibration" in row), None)
    if calibration:
        size = f"{calibration['samples']} windows of {calibration['seq_len']} tokens"
        lines.append(f"Calibration: {size} of {calibration['text']}.")
    machines = {f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in rows}
    loads = [row["load_at_start"] for row in rows]
    lines += [
        f"Machine: {'; '.join(sorted(machines))}. Load at the start of a row: {min(loads):.1f} to {max(loads):.1f}.",
        "Times of a busy machine are upper bounds. A star marks a commit with changes that were not committed.",
        "",
    ]
    return lines


def _piqa(rows: Sequence[dict[str, Any]], score: str) -> str:
    """Return a score in percent, of the rows that have it."""
    measured = [row["piqa"] for row in rows if "piqa" in row]
    if not measured:
        return ""
    values = [100 * scores[score] for scores in measured]
    error = max((max(values) - min(values)) / 2, *(100 * (scores[f"{score}_stderr"] or 0) for scores in measured))
    return f"{_mean(values):.2f} ± {error:.2f}"


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Return an SVG with one bar for each model and recipe, the best first."""
    bars = sorted(losses(rows).items(), key=lambda item: _mean(item[1]))
    height = len(bars) * (_BAR + _GAP) + _GAP + 24
    room = _WIDTH - _LABELS - 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="degradation D by recipe, lower is better">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LABELS}" y="16">D = ln(perplexity / FP), lower is better</text>',
    ]
    several = len({model for (model, _), _ in bars}) > 1
    for index, ((model, recipe), values) in enumerate(bars):
        mean, top = _mean(values), 24 + index * (_BAR + _GAP)
        width = max(1.0, room * min(mean, _LARGEST_D) / _LARGEST_D)
        label = f"{model.rpartition(':')[2]} {recipe}" if several else recipe
        cut = " (cut off)" if mean > _LARGEST_D else ""
        parts += [
            f'<text x="{_LABELS - 8}" y="{top + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{_LABELS}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="#3b6ea5"/>',
            f'<text x="{_LABELS + width + 6:.1f}" y="{top + 13}">{mean:.3f}{cut}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{_mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")
