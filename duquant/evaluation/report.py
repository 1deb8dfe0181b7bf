"""A report of what was measured: one HTML page that needs nothing else, and its pictures as SVG and PNG."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duquant.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Mapping[str, Any]
PAGE = "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto } p.note { color: #555 }
"""


def write_report(
    folder: Path, measured: Mapping[str, Metrics], *, baseline: str | None = None, title: str = "Evaluation"
) -> list[Path]:
    """Write report.html and its pictures into a folder; return the files, the page first.

    Args:
        folder: made if it is not there. Files of an earlier report are replaced.
        measured: sets of metrics (see `evaluate_plan`) by the names that the report gives them.
        baseline: which of them is the unquantized model.
        title: the page's heading.

    Raises:
        EvaluationError: matplotlib is not installed, or nothing was measured.
    """
    try:
        from duquant.evaluation import plots
    except ImportError as err:
        raise EvaluationError("a report needs the package matplotlib: pip install 'duquant[eval]'") from err
    figures = dict(_figures(measured, baseline))
    if not figures:
        raise EvaluationError("there is nothing to report: neither perplexity, tasks nor speed was measured")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: plots.svg_of(figure) for name, figure in figures.items()}
    page = folder / PAGE
    page.write_text(_page(measured, baseline, title, drawn), encoding="utf-8")
    files = [page]
    for name, figure in figures.items():
        svg, png = folder / f"{name}.svg", folder / f"{name}.png"
        svg.write_text(drawn[name], encoding="utf-8")
        png.write_bytes(plots.png_of(figure))
        files += [svg, png]
    return files


def _figures(measured: Mapping[str, Metrics], baseline: str | None) -> Iterator[tuple[str, "Figure"]]:
    from duquant.evaluation import plots

    if any("perplexity" in metrics for metrics in measured.values()):
        yield "perplexity", plots.perplexity_figure(measured, baseline)
    if any(metrics.get("tasks") for metrics in measured.values()):
        yield "tasks", plots.task_figure(measured)
    for index, metrics in enumerate(measured.values()):
        if "speed" in metrics and (metrics["speed"]["layer"] or metrics["speed"]["model"]):
            yield _speed_name(index), plots.speed_figure(metrics["speed"])


def _speed_name(index: int) -> str:
    return "speed" if index == 0 else f"speed-{index + 1}"


def _page(measured: Mapping[str, Metrics], baseline: str | None, title: str, drawn: Mapping[str, str]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    if "perplexity" in drawn:
        parts += ["<h2>Perplexity</h2>", drawn["perplexity"], _perplexity_table(measured, baseline)]
    if "tasks" in drawn:
        parts += ["<h2>Tasks</h2>", drawn["tasks"], _task_table(measured)]
    for index, (name, metrics) in enumerate(measured.items()):
        if "speed" in metrics:
            heading = "Speed and memory" if len(measured) == 1 else f"Speed and memory: {name}"
            parts += [f"<h2>{escape(heading)}</h2>", drawn.get(_speed_name(index), ""), *_speed(metrics["speed"])]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [
        "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in line)
        for tag, line in [("th", head), *(("td", row) for row in rows)]
    ]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _perplexity_table(measured: Mapping[str, Metrics], baseline: str | None) -> str:
    reference = measured.get(baseline or "", {}).get("perplexity")
    rows = []
    for name, metrics in measured.items():
        if "perplexity" in metrics:
            loss = "" if reference is None else f"{math.log(metrics['perplexity'] / reference):.4f}"
            sizes = (metrics["windows"], metrics["seq_len"], f"{metrics['tokens_per_second']:.0f}")
            rows.append((name, f"{metrics['perplexity']:.4f}", loss, *sizes, _megabytes(metrics["model_bytes"])))
    note = "" if reference is None else '<p class="note">D is ln(perplexity / the baseline&#8217;s).</p>'
    head = ("", "perplexity", "D", "windows", "tokens in each", "tokens/s", "weights in memory")
    return _table(head, rows) + note


def _task_table(measured: Mapping[str, Metrics]) -> str:
    rows = []
    for name, metrics in measured.items():
        for task, scores in metrics.get("tasks", {}).items():
            for metric in (each for each in scores if f"{each}_stderr" in scores):
                error = scores[f"{metric}_stderr"]
                asked = (scores["samples"], scores["num_fewshot"] or 0)
                rows.append(
                    (task, name, metric, f"{scores[metric]:.4f}", "" if error is None else f"{error:.4f}", *asked)
                )
    return _table(("task", "", "score", "value", "standard error", "questions", "solved examples shown"), rows)


def _speed(speed: Metrics) -> Iterator[str]:
    from duquant.evaluation.plots import CONTENDER_LABELS, load_name

    rates = speed["ceilings"]["giga_per_second"]
    own = speed["artifact"]
    itself = f" The artifact itself is: {CONTENDER_LABELS[own]}." if own else ""
    yield (
        f'<p class="note">{escape(speed["device"])}, {speed["threads"]} threads, kernels: {escape(speed["kernels"])}. '
        f"Ceilings of the same run: copying {rates['copy']} GB/s, bfloat16 products "
        f"{rates['bfloat16 product'] / 1e3:.2f} TFLOP/s. Medians; a line spans the 20th to the 80th percentile; "
        f"ratios are to bfloat16.{escape(itself)}</p>"
    )
    for scope, heading in (("layer", "One decoder layer, cold caches"), ("model", "Whole model")):
        rows = [
            (
                load_name(row),
                CONTENDER_LABELS[kind],
                f"{times['median_ms']:.3g} ({times['p20_ms']:.3g} to {times['p80_ms']:.3g})",
                f"{row['tokens_per_second'][kind]:.4g}",
                _ratio(row, "speedup", kind, "{:.2f}x"),
                _ratio(row, "transform_overhead", kind, "{:+.1%}"),
                _megabytes(row["cache_bytes"][kind]) if "cache_bytes" in row else "",
            )
            for row in speed[scope]
            for kind, times in row["times"].items()
        ]
        if rows:
            head = ("", "", "ms a step", "tokens/s", "speedup", "transform over none", "KV cache")
            yield f"<h3>{heading}</h3>{_table(head, rows)}"
    if linears := speed["memory"].get("linears"):
        yield (
            f"<p>Linears in memory: {_megabytes(linears['int4'])}, {linears['ratio']:.3f} of "
            f"{_megabytes(linears['bfloat16'])} in bfloat16.</p>"
        )
    for skipped in speed["skipped"]:
        words = f"Left out ({skipped['scope']}): {skipped['what']}, because {skipped['reason']}."
        yield f"<p>{escape(words)}</p>"


def _ratio(row: Metrics, name: str, kind: str, form: str) -> str:
    value = row.get(name, {}).get(kind)
    return "" if value is None else form.format(value)


def _megabytes(count: int | float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
