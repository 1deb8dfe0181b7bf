"""What the dashboard's pages are made of: plain view models, and the words for numbers."""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.jobs import JobEvent, JobState, LayerRow

HEAT_LEVELS = 8
NONE = "\N{EN DASH}"
"""How a table says that there is no value."""
_SITE_ERROR = "output_nmse"
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class LayerCell:
    """One square of the heat map."""

    row: LayerRow
    label: str
    sites: Mapping[str, float]
    """Squared error of the quantized outputs over their power, by site."""
    error: float | None
    """The mean over the sites."""
    error_level: int | None
    seconds_level: int | None


def layer_cells(layers: Sequence[LayerRow]) -> list[LayerCell]:
    """Rank layers by error and by time.

    A level is a rank and no fraction of the largest value: one outlier must not make all the rest look alike.
    """
    sites = [site_errors(row.metrics) if row.state == "done" else {} for row in layers]
    errors = [sum(by_site.values()) / len(by_site) if by_site else None for by_site in sites]
    seconds = [row.seconds if row.state == "done" else None for row in layers]
    return [
        LayerCell(
            row=row,
            label=layer_label(row.layer),
            sites=by_site,
            error=error,
            error_level=error_level,
            seconds_level=seconds_level,
        )
        for row, by_site, error, error_level, seconds_level in zip(
            layers, sites, errors, levels(errors), levels(seconds), strict=True
        )
    ]


def layer_label(layer: int) -> str:
    """Name a layer; -1 is the shard with both ends of the model."""
    return "ends" if layer < 0 else str(layer)


def recipe_parts(recipe: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Lay a recipe's groups out as names and values, its plain fields first."""
    plain = {name: value for name, value in recipe.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in recipe.items() if isinstance(value, Mapping)}
    titles = {"kv_cache": "KV cache"}
    return [
        ("General", _flat(plain)),
        *((titles.get(name, name.capitalize()), _flat(group)) for name, group in groups.items()),
    ]


def _flat(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in group.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return pairs


def site_errors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return each site's relative output error from a layer's metrics; sites without a finite one are left out."""
    errors = {}
    for site, report in metrics.items():
        value = report.get(_SITE_ERROR) if isinstance(report, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            errors[site] = float(value)
    return errors


def levels(values: Sequence[float | None]) -> list[int | None]:
    """Return each value's level, from 0 for the smallest to HEAT_LEVELS - 1 for the largest; None stays None.

    >>> levels([3.0, None, 1.0, 2.0])
    [7, None, 0, 3]
    """
    ranked = sorted({value for value in values if value is not None})
    top = max(len(ranked) - 1, 1)
    return [None if value is None else bisect_left(ranked, value) * (HEAT_LEVELS - 1) // top for value in values]


def duration(seconds: float | None) -> str:
    """Write a length of time for people.

    >>> duration(75), duration(3.21), duration(7322)
    ('1 min 15 s', '3.2 s', '2 h 2 min')
    """
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    """Write a number of bytes for people.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    if count is None:
        return NONE
    value = float(count)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes every value")


def clock(at: datetime | None) -> str:
    """Write a time of day."""
    return NONE if at is None else at.strftime("%Y-%m-%d %H:%M:%S")


def number(value: float | None) -> str:
    """Write a measurement with three significant digits.

    >>> number(0.00123456), number(0.05)
    ('1.23e-03', '0.05')
    """
    if value is None:
        return NONE
    return f"{value:.3g}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


def event_text(event: JobEvent) -> str:
    """Say in a few words what an event was."""
    data = event.data
    match event.type:
        case "progress":
            return f"{data.get('phase')}: {data.get('done')} of {data.get('total')}"
        case "planned":
            return f"{data.get('layers')} layers, {data.get('done')} of them done already"
        case "layer_started":
            return f"{layer_label(data['layer'])} on {data.get('node')}, attempt {data.get('attempt')}"
        case "layer_done":
            return f"{layer_label(data['layer'])} in {duration(data.get('seconds'))}"
        case "layer_failed":
            return f"{layer_label(data['layer'])}: {data.get('detail')}"
        case "claimed":
            return f"by {event.actor}, attempt {data.get('attempt')}"
        case "lease_lost":
            return f"{data.get('owner')} went silent; back in the queue"
        case "retry_scheduled":
            return f"again in {duration(data.get('in_seconds'))}: {data.get('detail')}"
        case "failed":
            return f"{data.get('reason')}: {data.get('detail')}"
    return f"by {event.actor}"


def filters() -> dict[str, Callable[..., str]]:
    """Return what the templates call."""
    return {"duration": duration, "size": size, "clock": clock, "number": number, "event_text": event_text}


STATE_ICONS: dict[str, str] = {
    JobState.BLOCKED: "pause",
    JobState.SCHEDULED: "clock",
    JobState.QUEUED: "dots",
    JobState.RUNNING: "play",
    JobState.CANCELLING: "clock",
    JobState.SUCCEEDED: "check",
    JobState.FAILED: "cross",
    JobState.CANCELLED: "stop",
}
