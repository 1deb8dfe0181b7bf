"""Reports: one page that needs nothing else, with every number in it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from duquant.errors import EvaluationError
from duquant.evaluation.report import write_report

SPREAD = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2}
ROW = {
    "phase": "decode",
    "batch": 16,
    "tokens": 16,
    "context": 8,
    "times": {"bfloat16": {**SPREAD, "median_ms": 4.0}, "rtn": SPREAD, "duquant": SPREAD},
    "tokens_per_second": {"bfloat16": 4000.0, "rtn": 8000.0, "duquant": 8000.0},
    "speedup": {"rtn": 2.0, "duquant": 2.0},
    "transform_overhead": {"duquant": 0.125},
    "cache_bytes": {"bfloat16": 4_000_000, "rtn": 1_100_000, "duquant": 1_100_000},
}
METRICS: dict[str, Any] = {
    "perplexity": 16.5,
    "tokens": 100,
    "windows": 2,
    "seq_len": 51,
    "tokens_per_second": 1234.0,
    "model_bytes": 121_000_000,
    "tasks": {
        "piqa": {"acc": 0.61, "acc_stderr": 0.011, "acc_norm": 0.67, "acc_norm_stderr": None, "samples": 1838,
                 "num_fewshot": 0, "seconds": 3.0},
    },
    "speed": {
        "artifact": "duquant", "device": "cpu", "threads": 2, "kernels": "vnni", "layer": [ROW], "model": [],
        "memory": {"linears": {"bfloat16": 200e6, "int4": 52e6, "ratio": 0.26}},
        "ceilings": {"giga_per_second": {"copy": 9.2, "bfloat16 product": 325.0}},
        "checked": [], "skipped": [{"scope": "model", "what": "prefill of 2048 tokens", "reason": "it takes <long>"}],
    },
}  # fmt: skip
BASELINE = {name: METRICS[name] for name in ("tokens", "windows", "seq_len", "tokens_per_second", "model_bytes")}


def test_the_page_holds_every_number_and_its_pictures(tmp_path: Path) -> None:
    files = write_report(
        tmp_path / "new", {"ours": METRICS, "fp <16>": {**BASELINE, "perplexity": 15.0}}, baseline="fp <16>"
    )
    assert files[0] == tmp_path / "new" / "report.html"
    assert {file.name for file in files[1:]} == {
        f"{name}.{suffix}" for name in ("perplexity", "tasks", "speed") for suffix in ("svg", "png")
    }
    page = files[0].read_text()
    for text in ("16.5000", "0.0953", "0.6100", "0.0110", "0.6700", "1838", "2.00x", "+12.5%", "0.260", "4 MB", "8000"):
        assert text in page, text
    assert "Left out (model): prefill of 2048 tokens, because it takes &lt;long&gt;." in page
    assert "fp &lt;16&gt;" in page
    assert "fp <16>" not in page
    assert page.count("<svg") == 3
    # Nothing is fetched from elsewhere: no scripts, styles or images by address.
    assert not any(mark in page for mark in ("<script", "<img", "<link", "url(http"))
    for file in files[1:]:
        if file.suffix == ".svg":
            ElementTree.fromstring(file.read_text())
        else:
            assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["perplexity", "tasks", "speed"])
def test_each_part_alone_makes_a_report(tmp_path: Path, part: str) -> None:
    files = write_report(tmp_path, {"ours": {**BASELINE, part: METRICS[part]}})
    assert [file.name for file in files] == ["report.html", f"{part}.svg", f"{part}.png"]


def test_the_same_metrics_give_the_same_picture(tmp_path: Path) -> None:
    pictures = [write_report(tmp_path / name, {"ours": METRICS})[2].read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing to report"):
        write_report(tmp_path, {"ours": {"seconds": 0.0}})
