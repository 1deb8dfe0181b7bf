"""What the dashboard computes before it shows anything."""

import math

from hypothesis import given
from hypothesis import strategies as st

from infra.jobs import LayerRow
from service.pages import HEAT_LEVELS, layer_cells, levels, recipe_parts, site_errors


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))))
def test_levels_keep_the_order_and_stay_in_range(values: list[float | None]) -> None:
    found = levels(values)
    pairs = [(value, level) for value, level in zip(values, found, strict=True) if value is not None]
    assert [level is None for level in found] == [value is None for value in values]
    for value, level in pairs:
        assert level is not None
        assert 0 <= level < HEAT_LEVELS
        assert all(level <= other_level for other, other_level in pairs if other >= value and other_level is not None)


def test_values_that_are_no_numbers_are_left_out() -> None:
    metrics = {"attn_in": {"output_nmse": 0.5}, "mlp_in": {"output_nmse": math.nan}, "mlp_out": {}, "note": "text"}
    assert site_errors(metrics) == {"attn_in": 0.5}


def test_a_layers_error_is_the_mean_over_its_sites_and_only_when_done() -> None:
    metrics = {"attn_in": {"output_nmse": 0.2}, "mlp_in": {"output_nmse": 0.4}}
    rows = [
        LayerRow(job_id="j", layer=-1, state="done"),
        LayerRow(job_id="j", layer=0, state="done", metrics=metrics),
        LayerRow(job_id="j", layer=1, state="running", metrics=metrics),
    ]
    cells = layer_cells(rows)
    assert [cell.label for cell in cells] == ["ends", "0", "1"]
    assert cells[0].error is None
    assert math.isclose(cells[1].error or 0, 0.3)
    assert cells[2].error is None


def test_recipes_are_laid_out_flat() -> None:
    parts = dict(recipe_parts({"seed": 0, "kv_cache": {"bits": 4}, "calibration": {"source": {"kind": "file"}}}))
    assert parts == {"General": [("seed", "0")], "KV cache": [("bits", "4")], "Calibration": [("source.kind", "file")]}
