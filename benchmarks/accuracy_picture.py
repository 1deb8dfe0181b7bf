"""The picture of the accuracy page: D of every recipe as bars, model by model."""

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from accuracy_rows import FP, Entry, Section

_WIDTH, _LABELS, _ROOM = 860, 140, 540
_BAR, _GAP, _HEADING, _AXIS = 16, 8, 34, 30
_LARGEST_D = 1.0
"""Longer bars are cut off: baselines would make all others too short to compare."""
_TICK = 0.2
_BITS = "W4A4KV4"
"""What goes without saying in the picture."""
_TODAY, _EARLIER, _OTHER_BITS, _LINE, _TEXT = "#2f6690", "#b5c9d8", "#a3a380", "#d9dee3", "#1f2933"


def picture(sections: Sequence[Section]) -> str:
    """Return an SVG: below each model a bar for each of its recipes, the best first; whiskers are the seeds' ends.

    Bars of recipes that leave the cache or activations in 16 bits have another colour; those of the latter stand last.
    """
    parts: list[str] = []
    top = 4.0
    for section in sections:
        bars = [entry for entry in section.entries if entry.losses]
        if bars:
            parts += _section(section, bars, top)
            top += _HEADING + len(bars) * (_BAR + _GAP) + _AXIS
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top:.0f}" width="{_WIDTH}" height="{top:.0f}" '
        f'font-family="sans-serif" font-size="12" fill="{_TEXT}" role="img" '
        'aria-label="degradation D by recipe, lower is better">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{top:.0f}" fill="white"/>', *parts, "</svg>", ""])


def _section(section: Section, bars: Sequence[Entry], top: float) -> Iterator[str]:
    evaluation = section.evaluation
    text = f"{evaluation['windows']} windows of {evaluation['seq_len']} tokens of {evaluation['text']}"
    yield f'<text x="8" y="{top + 18}"><tspan font-weight="bold">{escape(section.model)}</tspan> {escape(text)}</text>'
    first, last = top + _HEADING - 6, top + _HEADING + len(bars) * (_BAR + _GAP)
    for tick in range(round(_LARGEST_D / _TICK) + 1):
        x = _x(tick * _TICK)
        yield f'<line x1="{x:.1f}" y1="{first}" x2="{x:.1f}" y2="{last}" stroke="{_LINE}"/>'
        yield f'<text x="{x:.1f}" y="{last + 14}" text-anchor="middle" font-size="11">{tick * _TICK:.1f}</text>'
    yield f'<text x="{_x(_LARGEST_D) + 16:.1f}" y="{last + 14}" font-size="11">D, lower is better</text>'
    for index, entry in enumerate(bars):
        yield from _bar(entry, top + _HEADING + index * (_BAR + _GAP))


def _bar(entry: Entry, top: float) -> Iterator[str]:
    middle, low, high = top + _BAR / 2, min(entry.losses), max(entry.losses)
    end = _x(entry.loss)
    color = _EARLIER if entry.note else _TODAY if entry.bits in ("", _BITS) else _OTHER_BITS
    assert entry.recipe != FP
    yield f'<text x="{_LABELS - 8}" y="{top + 12}" text-anchor="end">{escape(entry.recipe)}</text>'
    yield f'<rect x="{_LABELS}" y="{top}" width="{max(1.0, end - _LABELS):.1f}" height="{_BAR}" fill="{color}"/>'
    if len(entry.losses) > 1:
        yield f'<path d="M{_x(low):.1f} {middle}H{_x(high):.1f}" stroke="{_TEXT}" stroke-width="2"/>'
        end = max(end, _x(high))
    label = f"{entry.loss:.3f}"
    if entry.bits not in ("", _BITS):
        label = f"{entry.bits}: {label}"
    if len(entry.losses) > 1:
        label += f" ± {(high - low) / 2:.3f}"
    if entry.loss > _LARGEST_D:
        label += ", cut off"
    if entry.note:
        label += " (measured earlier)"
    yield f'<text x="{end + 6:.1f}" y="{top + 12}">{escape(label)}</text>'


def _x(loss: float) -> float:
    return _LABELS + _ROOM * min(max(loss, 0.0), _LARGEST_D) / _LARGEST_D
