"""Pictures of metrics. Figures are made one by one, without pyplot: nothing is kept between them, in any thread."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duquant.evaluation.contender_names import ARTIFACT, BFLOAT16, DUQUANT, HADAMARD, RTN

Metrics = Mapping[str, Any]

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Okabe and Ito's, told apart by eyes of every kind (jfly.uni-koeln.de/color)."""
_GREY, _INK = "#8C8C8C", "#222222"
_CONTENDER_COLOURS = {BFLOAT16: _GREY, RTN: "#E69F00", HADAMARD: "#56B4E9", DUQUANT: "#0072B2", ARTIFACT: "#0072B2"}
CONTENDER_LABELS = {
    BFLOAT16: "bfloat16",
    RTN: "INT4, no transform",
    HADAMARD: "INT4, Hadamard",
    DUQUANT: "INT4, DuQuant",
    ARTIFACT: "INT4",
}
SCOPES = {"layer": "a layer", "model": "whole model"}
_BAR, _INCH_A_BAR = 0.72, 0.34
_DPI = 160


def perplexity_figure(measured: Mapping[str, Metrics], baseline: str | None) -> Figure:
    """Return bars of perplexity, with a line at the baseline's."""
    names = [name for name, metrics in measured.items() if "perplexity" in metrics]
    values = [measured[name]["perplexity"] for name in names]
    figure, axes = _panel(len(names), "perplexity (lower is better)")
    colours = [_GREY if name == baseline else _COLOURS[0] for name in names]
    axes.barh(range(len(names)), values, height=_BAR, color=colours)
    for place, value in enumerate(values):
        ratio = (
            "" if baseline not in names or names[place] == baseline else f"  ({value / _of(measured, baseline):.3f}x)"
        )
        axes.text(value, place, f"  {value:.2f}{ratio}", va="center", fontsize=9, color=_INK)
    if baseline in names:
        axes.axvline(_of(measured, baseline), color=_GREY, linestyle="--", linewidth=1, zorder=0)
    _name_bars(axes, names)
    axes.set_xlim(0, max(values) * 1.28)
    return figure


def _of(measured: Mapping[str, Metrics], name: str | None) -> float:
    assert name is not None
    return float(measured[name]["perplexity"])


def task_figure(measured: Mapping[str, Metrics]) -> Figure:
    """Return bars of each task's main score with its standard error, the sets of metrics side by side."""
    sets = [name for name, metrics in measured.items() if metrics.get("tasks")]
    tasks = list(dict.fromkeys(task for name in sets for task in measured[name]["tasks"]))
    figure, axes = _panel(max(len(sets), 1.5) * len(tasks), "score, with one standard error")
    height = _BAR / len(sets)
    for index, name in enumerate(sets):
        for place, task in enumerate(tasks):
            scores = measured[name]["tasks"].get(task)
            metric = None if scores is None else main_metric(scores)
            if scores is None or metric is None:
                continue
            where = place + (index - (len(sets) - 1) / 2) * height
            value, error = scores[metric], scores.get(f"{metric}_stderr") or 0.0
            colour = _COLOURS[index % len(_COLOURS)]
            axes.barh(
                where,
                value,
                height=height * 0.92,
                color=colour,
                label=name if place == 0 else None,
                xerr=error,
                error_kw={"ecolor": _INK, "capsize": 3, "elinewidth": 1},
            )
            axes.text(value + error, where, f"  {value:.3f}", va="center", fontsize=9, color=_INK)
    _name_bars(axes, [f"{task}\n{_metric_of(measured, task)}" for task in tasks])
    axes.set_xlim(0, 1.12)
    if len(sets) > 1:
        _legend(figure, axes)
    return figure


def main_metric(scores: Mapping[str, Any]) -> str | None:
    """Return the score that a task is known by: acc_norm, acc, or else the first that it has."""
    plain = [name for name in scores if f"{name}_stderr" in scores]
    return next((name for name in ("acc_norm", "acc", *plain) if name in plain), None)


def _metric_of(measured: Mapping[str, Metrics], task: str) -> str:
    for metrics in measured.values():
        if task in metrics.get("tasks", {}):
            return main_metric(metrics["tasks"][task]) or ""
    return ""


def speed_figure(speed: Metrics) -> Figure:
    """Return one small panel for each row: tokens a second of each contender, with its ratio to bfloat16."""
    by_scope = {scope: {load_name(row): row for row in speed[scope]} for scope in SCOPES if speed[scope]}
    loads = list(dict.fromkeys(load for rows in by_scope.values() for load in rows))
    bars = max(len(row["times"]) for rows in by_scope.values() for row in rows.values())
    figure = Figure(figsize=(2.9 * len(loads) + 1.7, (_INCH_A_BAR * bars + 0.95) * len(by_scope)), layout="constrained")
    grid = figure.subplots(len(by_scope), len(loads), squeeze=False)
    for line, (scope, rows) in zip(grid, by_scope.items(), strict=True):
        named = False
        for axes, load in zip(line, loads, strict=True):
            axes.set_title(f"{SCOPES[scope]}: {load}", fontsize=9, loc="left", color=_INK)
            if load in rows:
                _speed_panel(axes, rows[load], is_named=not named)
                named = True
            else:
                axes.set_axis_off()
                axes.text(0, 0.9, "left out", fontsize=9, color=_GREY, transform=axes.transAxes)
    return figure


def load_name(row: Mapping[str, Any]) -> str:
    """Return what a row of the kernel benchmark is, in words."""
    return f"prefill {row['tokens']}" if row["phase"] == "prefill" else f"decode, batch {row['batch']}"


def _speed_panel(axes: Axes, row: Mapping[str, Any], *, is_named: bool) -> None:
    rates, ratios = row["tokens_per_second"], row.get("speedup", {})
    kinds = list(rates)
    axes.barh(range(len(kinds)), list(rates.values()), height=_BAR, color=[_CONTENDER_COLOURS[kind] for kind in kinds])
    longest = 0.0
    for place, (kind, rate) in enumerate(rates.items()):
        times = row["times"][kind]
        ends = [row["tokens"] / times[end] * 1e3 for end in ("p80_ms", "p20_ms")]
        axes.plot(ends, [place, place], color=_INK, linewidth=1)
        ratio = f"{ratios[kind]:.2f}x" if kind in ratios else ""
        longest = max(longest, rate, ends[1])
        axes.text(max(rate, ends[1]), place, f" {short(rate)}/s  {ratio}", va="center", fontsize=8, color=_INK)
    _name_bars(axes, [CONTENDER_LABELS[kind] for kind in kinds] if is_named else [""] * len(kinds))
    axes.set_xlim(0, longest * 1.7)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def short(value: int | float) -> str:
    """Return a number in three figures, thousands with a k.

    >>> [short(v) for v in (9.876, 98.76, 9876.0)]
    ['9.9', '99', '9.9k']
    """
    if value >= 1000:
        return f"{short(value / 1000)}k"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _panel(bars: int | float, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, _INCH_A_BAR * bars + 0.75), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label, fontsize=9, color=_INK)
    return figure, axes


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9, color=_INK)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG, from its first tag on."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
