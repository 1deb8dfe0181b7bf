"""The measured part of a model card: what was measured, on which text, where and when."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NOTHING = "Nothing has been measured on this artifact yet."


def measured(evaluation: Mapping[str, Any]) -> str:
    """Return the Markdown of a manifest's `evaluation`."""
    results: Sequence[Mapping[str, Any]] = evaluation.get("results", ())
    gate = evaluation.get("quality_gate")
    sections = [_perplexities(results), _tasks(results), _speeds(results)]
    if gate:
        sections.append(_gate(gate))
    return "\n\n".join(section for section in sections if section) or _NOTHING


def _perplexities(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            _number(result["perplexity"]),
            _number(result.get("baseline", {}).get("perplexity")),
            _increase(result),
            text_words(result["text"]),
            f"{result['windows']} of {result['seq_len']} tokens",
            *_where(result),
        )
        for result in results
        if "perplexity" in result
    ]
    return _table(("perplexity", "unquantized", "increase", "text", "windows", "device", "date"), rows)


def _tasks(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            _code(task),
            score,
            _with_error(scores, score),
            _with_error(result.get("baseline", {}).get("tasks", {}).get(task, {}), score),
            scores.get("samples"),
            scores.get("num_fewshot"),
            *_where(result),
        )
        for result in results
        for task, scores in result.get("tasks", {}).items()
        for score in sorted(name for name in scores if f"{name}_stderr" in scores)
    ]
    columns = ("task", "score", "value", "unquantized", "questions", "solved examples shown", "device", "date")
    return _table(columns, rows)


def _with_error(scores: Mapping[str, Any], score: str) -> str:
    error = scores.get(f"{score}_stderr")
    return _number(scores.get(score)) + ("" if error is None else f" ± {error:.4f}")


def _speeds(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            "whole model" if row["scope"] == "model" else "one layer",
            f"prefill of {row['tokens']}" if row["phase"] == "prefill" else f"decode, batch {row['batch']}",
            f"{row['tokens_per_second']:.4g}",
            "" if row.get("speedup") is None else f"{row['speedup']:.2f}x",
            *_where(result),
        )
        for result in results
        for row in result.get("speed", ())
    ]
    return _table(("of", "load", "tokens/s", "of bfloat16", "device", "date"), rows)


def _increase(result: Mapping[str, Any]) -> str:
    baseline = result.get("baseline", {}).get("perplexity")
    return "" if not baseline else f"{result['perplexity'] / baseline - 1:+.1%}"


def _gate(gate: Mapping[str, Any]) -> str:
    rows = [(check["check"], check["limit"], f"{check['value']:.1%}") for check in gate["checks"]]
    return "Quality gate, passed when the artifact was made:\n\n" + _table(("check", "limit", "measured"), rows)


def _where(result: Mapping[str, Any]) -> tuple[str, str]:
    return str(result.get("device", "")), str(result.get("measured_at", ""))[:10]


def text_words(text: Mapping[str, Any]) -> str:
    """Return what a text is called among people.

    >>> text_words({"kind": "file", "name": "wiki.txt", "part": "evaluation"})
    'file `wiki.txt`, evaluation half'
    >>> text_words({"kind": "hub", "name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"})
    'hub `Salesforce/wikitext wikitext-2-raw-v1 test`'
    """
    names = [text.get("name")]
    if text["kind"] == "hub":
        names += [text.get("config"), text.get("split")]
    half = "" if text.get("part", "all") == "all" else f", {text['part']} half"
    return f"{text['kind']} {_code(' '.join(str(name) for name in names if name))}{half}"


def _code(words: str) -> str:
    """Return words that people chose as code, out of which no Markdown and no HTML leads."""
    return "`" + words.replace("`", "'") + "`"


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table without the columns that no row fills; nothing when there are no rows."""
    filled = [index for index in range(len(columns)) if any(row[index] not in ("", None) for row in rows)]
    return "\n".join(_lines([columns[index] for index in filled], [[row[index] for index in filled] for row in rows]))


def _lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    if not rows:
        return
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        # Names of texts are their owners' words: they must not end a cell or a row.
        yield f"| {' | '.join(' '.join(str(cell).split()).replace('|', chr(92) + '|') for cell in row)} |"
