"""Statistics of the sites."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from duquant.calibration.statistics import (
    SiteStatistics,
    StatisticsRecorder,
    load_statistics,
    merge,
    save_statistics,
)
from duquant.errors import CalibrationError
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint

CPU = torch.device("cpu")
SITE = LLAMA.sites[0]


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 10, 6, generator=generator).bfloat16() for _ in range(count)]


def recorded(inputs: list[torch.Tensor], stride: int = 4) -> SiteStatistics:
    recorder = StatisticsRecorder([SITE], row_stride=stride)
    for X in inputs:
        recorder.add(SITE.name, X)
    return recorder.finish()[SITE.name]


def test_absmax_is_over_all_tokens() -> None:
    statistics = recorded(batches())
    assert statistics.absmax.dtype == torch.float32
    assert torch.equal(statistics.absmax, torch.cat(batches()).float().abs().amax((0, 1)))


@pytest.mark.parametrize("stride", [1, 3, 4, 100])
def test_rows_are_every_strideth_token_of_every_window(stride: int) -> None:
    rows = recorded(batches(), stride).rows
    expected = torch.cat([window[::stride] for window in torch.cat(batches())])
    assert torch.equal(rows, expected)


def test_micro_batches_do_not_matter() -> None:
    whole, cut = recorded([torch.cat(batches())]), recorded(batches())
    assert torch.equal(whole.absmax, cut.absmax)
    assert torch.equal(whole.rows, cut.rows)


def test_second_moment_is_the_exact_sum_over_every_strideth_token() -> None:
    recorder = StatisticsRecorder([SITE], row_stride=4, moment_stride=3)
    for X in batches():
        recorder.add(SITE.name, X)
    found = recorder.finish()[SITE.name].second_moment
    assert found is not None
    X = torch.cat([window[::3] for window in torch.cat(batches())]).double()
    torch.testing.assert_close(found.double(), X.T @ X, rtol=1e-6, atol=1e-6)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "the setting was put back"


def test_second_moments_are_kept_only_when_asked_for() -> None:
    assert recorded(batches()).second_moment is None


def test_second_moments_of_shards_add_up_and_survive_a_file(tmp_path: Path) -> None:
    parts = []
    for index, X in enumerate(batches()):
        recorder = StatisticsRecorder([SITE], row_stride=4, moment_stride=1)
        recorder.add(SITE.name, X)
        save_statistics(tmp_path / str(index), recorder.finish())
        parts.append(load_statistics(tmp_path / str(index), CPU))
    merged = merge(parts)[SITE.name].second_moment
    assert merged is not None
    X = torch.cat(batches()).reshape(-1, 6).double()
    torch.testing.assert_close(merged.double(), X.T @ X, rtol=1e-6, atol=1e-6)


def test_mean_squares_are_over_all_tokens_and_weigh_shards_by_their_windows(tmp_path: Path) -> None:
    parts = []
    for index, inputs in enumerate((batches()[:2], batches()[2:])):
        recorder = StatisticsRecorder([SITE], row_stride=4, mean_squares=True)
        for X in inputs:
            recorder.add(SITE.name, X)
        save_statistics(tmp_path / str(index), recorder.finish())
        parts.append(load_statistics(tmp_path / str(index), CPU))
    found = merge(parts, [4, 2])[SITE.name].mean_square
    assert found is not None
    assert found.dtype == torch.float32
    expected = torch.cat(batches()).reshape(-1, 6).double().square().mean(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_mean_squares_are_kept_only_when_asked_for() -> None:
    assert recorded(batches()).mean_square is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [(0, 0, 0), (1, 9, 5), (1, 3, 2)])
def test_non_finite_activations_are_an_error_that_names_the_site(bad: float, position: tuple[int, int, int]) -> None:
    inputs = batches()
    inputs[1][position] = bad
    with pytest.raises(CalibrationError, match=f"activations at site {SITE.name} are NaN or Inf") as caught:
        recorded(inputs)
    assert caught.value.facts["site"] == SITE.name


@pytest.mark.parametrize("kept", [{"mean_squares": True}, {"moment_stride": 1}], ids=["mean squares", "moment"])
def test_squares_that_overflow_are_an_error_that_names_the_site_and_the_size(kept: dict[str, Any]) -> None:
    """Activations of 1e20 are finite, and their squares are not in float32."""
    recorder = StatisticsRecorder([SITE], row_stride=4, **kept)
    X = batches()[0]
    X[1, 3, 2] = -1e20
    recorder.add(SITE.name, X)
    with pytest.raises(CalibrationError, match=rf"site {SITE.name} are of up to 1\.0e\+20, .* squares") as caught:
        recorder.finish()
    assert caught.value.facts["site"] == SITE.name


def test_large_activations_whose_squares_nobody_needs_are_accepted() -> None:
    assert float(recorded([batches()[0] * 1e20]).absmax.max()) > 1e19


def test_site_that_nothing_reached_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=f"no activations reached site {SITE.name}"):
        recorded([])


def test_hooks_see_the_inputs_of_each_site_and_are_removed(tiny_model: Callable[..., Path]) -> None:
    source = SourceCheckpoint(tiny_model())
    skeleton = Skeleton(source, CPU)
    recorder = StatisticsRecorder(LLAMA.sites, row_stride=1)
    X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad(), skeleton.layer(0, skeleton.load(source, 0)) as layer:
        with recorder.attached(layer):
            skeleton.forward(layer, X)
        statistics = recorder.finish()
        assert not any(module._forward_pre_hooks for module in layer.modules())
        norm = layer.get_submodule("input_layernorm")
        assert torch.equal(statistics["attn_in"].rows, norm(X).reshape(-1, 64))
    assert {name: entry.rows.shape for name, entry in statistics.items()} == {
        "attn_in": (16, 64),
        "attn_out": (16, 64),
        "mlp_in": (16, 64),
        "mlp_out": (16, 96),
    }


def test_hooks_are_removed_after_an_error() -> None:
    layer = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    with pytest.raises(RuntimeError, match="on purpose"):  # noqa: SIM117
        with StatisticsRecorder([SITE], row_stride=1).attached(layer):
            raise RuntimeError("on purpose")
    assert not any(module._forward_pre_hooks for module in layer.modules())


def test_merge_joins_in_shard_order() -> None:
    parts = [{"attn_in": recorded([X])} for X in batches()]
    merged, whole = merge(parts)["attn_in"], recorded(batches())
    assert torch.equal(merged.absmax, whole.absmax)
    assert torch.equal(merged.rows, whole.rows)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = {site.name: recorded(batches()) for site in LLAMA.sites}
    path = tmp_path / "s.safetensors"
    save_statistics(path, statistics)
    loaded = load_statistics(path, CPU)
    assert set(loaded) == set(statistics)
    for name, entry in statistics.items():
        assert torch.equal(loaded[name].absmax, entry.absmax)
        assert torch.equal(loaded[name].rows, entry.rows)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 10])
def test_missing_or_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "s.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"cannot read calibration statistics .*s\.safetensors"):
        load_statistics(path, CPU)


def test_file_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    save_file({"attn_in.absmax": torch.ones(3)}, path)
    with pytest.raises(CalibrationError, match="cannot read calibration statistics"):
        load_statistics(path, CPU)


def test_what_enters_experts_is_recorded_over_all_of_them(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = SourceCheckpoint(tiny_model("mixtral"))
    skeleton = Skeleton(source, CPU)
    sites = source.architecture.sites
    parts = []
    for seed in range(2):
        recorder = StatisticsRecorder(sites, row_stride=1)
        X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        seen: list[torch.Tensor] = []
        with torch.no_grad(), skeleton.layer(0, skeleton.load(source, 0)) as layer, recorder.attached(layer):
            for expert in range(4):
                down = layer.get_submodule(f"mlp.experts.{expert}.down_proj")
                down.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
            skeleton.forward(layer, X)
        statistics = recorder.finish()
        assert statistics["mlp_in"].rows.shape == (16, 64)
        # Each token once for each of its two experts, in the order of the tokens.
        assert statistics["mlp_out"].rows.shape == (32, 96)
        entered = torch.cat(seen).float()
        assert torch.equal(statistics["mlp_out"].absmax, entered.abs().amax(0))
        rows = statistics["mlp_out"].rows.float()
        assert sorted(rows.sum(1).tolist()) == sorted(entered.sum(1).tolist())
        save_statistics(tmp_path / str(seed), statistics)
        parts.append(load_statistics(tmp_path / str(seed), CPU))
    for site in ("mlp_in", "mlp_out"):
        reached = merge(parts)[site].reached
        assert reached is not None
        assert int(reached.sum()) == 2 * 32
        counts = [part[site].reached for part in parts]
        assert torch.equal(reached, sum(count for count in counts if count is not None))
    assert merge(parts)["attn_in"].reached is None
