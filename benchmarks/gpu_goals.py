"""The GPU goals beside what a run measured. A goal without a measurement says None: it is never filled in."""

from typing import Any

Report = dict[str, Any]


def goals(report: Report) -> list[dict[str, Any]]:
    """Return one row for each goal: must, aim, what was measured (larger is better unless the name says overhead)."""
    small, large = "llama2-7b", "llama2-70b"
    rows: list[tuple[str, float, float, float | None]] = []
    for model, must, aim in ((small, 1.4, 1.55), (large, 1.5, 1.65)):
        rows.append((f"{model}: prefill layer, 2048 tokens, against bf16", must, aim, _speedup(report, model, 1, 2048)))
    for words, prompt, must, aim in (("prefill", 2048, 0.05, 0.02), ("decode", 0, 0.15, 0.08)):
        rows.append((f"{small}: overhead of the transform, {words}", must, aim, _overhead(report, small, prompt)))
    share, against = _decode_product(report, small)
    rows.append((f"{small}: decode product, 1 token, share of copy bandwidth", 0.75, 0.88, share))
    rows.append((f"{small}: decode product, 1 token, against bf16", 3.0, 3.5, against))
    for model, must, aim in ((small, 2.2, 2.7), (large, 2.9, 3.3)):
        rows.append((f"{model}: decode layer, batch 1, against bf16", must, aim, _speedup(report, model, 1, 0)))
    rows.append(
        (
            f"{small}: decode layer, batch 64, context 2048, INT4 cache, against bf16",
            2.2,
            3.0,
            _speedup(report, small, 64, 0),
        )
    )
    return [
        {"goal": goal, "must": must, "aim": aim, "measured": None if found is None else round(found, 3)}
        for goal, must, aim, found in rows
    ]


def _layer(report: Report, model: str, batch: int, prompt: int) -> dict[str, dict[str, float]] | None:
    for row in report.get("layer", ()):
        if (row["model"], row["batch"], row["prompt"]) == (model, batch, prompt):
            found: dict[str, dict[str, float]] = row["graph"]
            return found
    return None


def _speedup(report: Report, model: str, batch: int, prompt: int) -> float | None:
    times = _layer(report, model, batch, prompt)
    return None if times is None else times["bf16"]["us"] / times["duquant"]["us"]


def _overhead(report: Report, model: str, prompt: int) -> float | None:
    times = _layer(report, model, 1, prompt)
    return None if times is None else times["duquant"]["us"] / times["rtn"]["us"] - 1


def _decode_product(report: Report, model: str) -> tuple[float | None, float | None]:
    """Return the share of copy bandwidth, and the speedup over bf16, of the largest product with one token."""
    found = [row for row in report.get("linear", ()) if row["model"] == model and row["M"] == 1]
    if not found or not report.get("ceilings"):
        return None, None
    row = max(found, key=lambda each: each["K"] * each["N"])
    bytes_per_s = row["K"] * row["N"] / 2 / row["graph"]["int4"]["us"] * 1e6
    return (
        bytes_per_s / report["ceilings"][0]["copy_bytes_per_s"],
        row["graph"]["bf16"]["us"] / row["graph"]["int4"]["us"],
    )
