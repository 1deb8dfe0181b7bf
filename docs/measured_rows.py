"""What the pages of measurements share: reading rows, a section for each model, tables, measured commits."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from duquant.config import ALGORITHM_VERSION, Recipe

Row = dict[str, Any]


def read_rows(results: Path) -> list[Row]:
    """Return the rows of a results file, none when there is no file."""
    rows: list[Row] = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []
    return rows


def is_earlier(row: Row, recipe: Recipe) -> bool:
    """Whether a row was measured with another recipe than today's `recipe` of its name, or by another algorithm."""
    return bool(row["recipe_digest"] != recipe.digest() or row["algorithm_version"] != ALGORITHM_VERSION)


def page_by_model(head: str, rows: Sequence[Row], table: Callable[[Sequence[Row]], str]) -> str:
    """Return a page with a table of each model's rows."""
    parts = [head]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts.append(f"## {model}\n")
        parts.append(table([row for row in rows if row["model"] == model]))
    if not rows:
        parts.append("Not measured yet.\n")
    return "\n".join(parts).rstrip() + "\n"


def commits_told(rows: Sequence[Row]) -> str:
    """Return a sentence with the commits, a star at those with changes that were not committed."""
    commits = {f"{row['commit'][:7]}{'*' if row['has_uncommitted_changes'] else ''}" for row in rows}
    legend = "; a star marks changes that were not committed" if any("*" in commit for commit in commits) else ""
    return f"Commits: {', '.join(sorted(commits))}{legend}."


def machines_of(rows: Iterable[Row]) -> str:
    """Return the machines, each once."""
    return "; ".join(sorted({f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in rows}))


def figures_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column has words and whose others have figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
