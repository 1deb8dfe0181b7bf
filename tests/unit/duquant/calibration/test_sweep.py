"""The unquantized sweep through files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duquant.calibration.statistics import load_key_statistics, load_statistics, merge
from duquant.calibration.sweep import (
    WorkDir,
    embed_shard,
    learning_windows,
    load_inputs,
    shard_windows,
    sweep_layer,
    write_tokens,
)
from duquant.calibration.text import calibration_windows
from duquant.config import CalibrationConfig, LearningConfig, Recipe, WeightConfig
from duquant.errors import CalibrationError, ScratchError, SourceError
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint

CPU = torch.device("cpu")


class Sweep:
    """One calibration run over a tiny model."""

    def __init__(self, model: Path, recipe: Recipe, root: Path) -> None:
        self.source, self.recipe, self.work = SourceCheckpoint(model), recipe, WorkDir(root)
        self.skeleton = Skeleton(self.source, CPU)
        calibration = recipe.calibration
        windows = calibration_windows(model, calibration, seed=0)
        write_tokens(self.work, windows)
        self.windows = windows

    def embed(self, shard: int) -> None:
        embed_shard(self.source, self.skeleton, self.recipe, self.work, shard)

    def layer(self, layer: int, shard: int) -> None:
        sweep_layer(self.source, self.skeleton, self.recipe, self.work, layer, shard)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.work.root.iterdir())}


SweepFactory = Callable[..., Sweep]


@pytest.fixture
def sweep(tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path) -> SweepFactory:
    """Factory of runs, each in its own folder."""

    def make(name: str = "work", model: Path | None = None, with_recipe: Recipe | None = None) -> Sweep:
        return Sweep(model or tiny_model(), with_recipe or recipe, tmp_path / name)

    return make


@pytest.mark.parametrize("samples", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("shards", [1, 2, 3, 9])
def test_shards_part_the_windows_evenly(samples: int, shards: int) -> None:
    ranges = shard_windows(CalibrationConfig(samples=samples, shards=shards))
    assert [window for part in ranges for window in part] == list(range(samples))
    sizes = [len(part) for part in ranges]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kept", [1, 3, 6, 99])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_windows_to_learn_on_are_so_many_whatever_the_shards(kept: int, shards: int) -> None:
    calibration = CalibrationConfig(samples=6, shards=shards)
    recipe = Recipe(calibration=calibration, learning=LearningConfig(samples=kept))
    parts = shard_windows(calibration)
    found = [parts[shard][i] for shard in range(shards) for i in learning_windows(recipe, shard)]
    assert len(found) == len(set(found)) == min(kept, 6)
    whole = replace(recipe, calibration=replace(calibration, shards=1))
    assert found == learning_windows(whole, 0)


def learning(recipe: Recipe) -> Recipe:
    return replace(recipe, weight=WeightConfig(clip="learned"), learning=LearningConfig(samples=3, seq_len=20))


def test_inputs_to_learn_on_are_the_first_tokens_of_the_boundary(sweep: SweepFactory, recipe: Recipe) -> None:
    run = sweep(with_recipe=learning(recipe))
    expected = []
    for shard in (0, 1):
        run.embed(shard)
        X = torch.frombuffer(bytearray(run.work.boundary(0, shard).read_bytes()), dtype=torch.bfloat16)
        expected += [X.view(3, 32, 64)[i, :20] for i in learning_windows(run.recipe, shard)]
        run.layer(0, shard)
    assert torch.equal(load_inputs(run.work, 0, 2, CPU), torch.stack(expected))


def test_recipes_that_learn_nothing_keep_no_inputs(sweep: SweepFactory) -> None:
    run = sweep()
    run.embed(0)
    run.layer(0, 0)
    assert not list(run.work.root.glob("inputs-*"))


def test_broken_inputs_are_swept_again(sweep: SweepFactory, recipe: Recipe) -> None:
    run = sweep(with_recipe=learning(recipe))
    for shard in (0, 1):
        run.embed(shard)
        run.layer(0, shard)
    before = load_inputs(run.work, 0, 2, CPU)
    run.work.inputs(0, 1).write_bytes(b"cut")
    with pytest.raises(ScratchError, match="inputs that were kept to learn on"):
        load_inputs(run.work, 0, 2, CPU)
    run.layer(0, 1)
    assert torch.equal(load_inputs(run.work, 0, 2, CPU), before)


@pytest.mark.parametrize(("sinks", "left_out"), [(0, 1), (1, 1), (4, 4)])
def test_statistics_of_keys_are_in_the_file_of_those_that_smooth_them(
    sweep: SweepFactory, recipe: Recipe, sinks: int, left_out: int
) -> None:
    kv_cache = replace(recipe.kv_cache, smooth_keys=True, sink_tokens=sinks)
    run, plain = sweep("with", with_recipe=replace(recipe, kv_cache=kv_cache)), sweep("without")
    for each in (run, plain):
        each.embed(0)
        each.layer(0, 0)
    file = run.work.statistics(0, 0)
    found = load_key_statistics(file, CPU)
    assert int(found.tokens) == 3 * (32 - left_out)
    assert found.key_sum.dtype == torch.float64
    sites, expected = load_statistics(file, CPU), load_statistics(plain.work.statistics(0, 0), CPU)
    assert sites.keys() == expected.keys()
    for name, entry in expected.items():
        assert torch.equal(sites[name].rows, entry.rows)
    assert "keys.key_sum" not in load_file(plain.work.statistics(0, 0))
    file.write_bytes(b"cut")
    with pytest.raises(ScratchError, match="cannot read calibration statistics"):
        load_key_statistics(file, CPU)
    assert not file.exists()


def test_shards_do_not_depend_on_the_order_of_work(sweep: SweepFactory) -> None:
    first, second = sweep("first"), sweep("second")
    for layer in (-1, 0, 1):
        for shard in (0, 1):
            first.embed(shard) if layer < 0 else first.layer(layer, shard)
    for shard in (1, 0):
        second.embed(shard)
        for layer in (0, 1):
            second.layer(layer, shard)
    assert first.files() == second.files()
    merged = [
        merge([load_statistics(run.work.statistics(1, shard), CPU) for shard in (0, 1)]) for run in (first, second)
    ]
    for site in LLAMA.sites:
        assert torch.equal(merged[0][site.name].rows, merged[1][site.name].rows)


def test_number_of_shards_changes_no_statistics(sweep: SweepFactory, recipe: Recipe) -> None:
    one = replace(recipe, calibration=replace(recipe.calibration, shards=1))
    runs = [sweep("two"), sweep("one", with_recipe=one)]
    merged = []
    for run, shards in zip(runs, (2, 1), strict=True):
        for shard in range(shards):
            run.embed(shard)
            run.layer(0, shard)
        merged.append(merge([load_statistics(run.work.statistics(0, shard), CPU) for shard in range(shards)]))
    for site in LLAMA.sites:
        # Micro-batches of two cut six windows the same way in shards of three and in one of six only at the front;
        # products of another batch size may round otherwise in bfloat16.
        bound = 2 * torch.finfo(torch.bfloat16).eps * float(merged[1][site.name].absmax.max())
        torch.testing.assert_close(merged[0][site.name].absmax, merged[1][site.name].absmax, atol=bound, rtol=0)


def test_embedding_boundary_holds_the_embedded_windows(sweep: SweepFactory) -> None:
    run = sweep()
    run.embed(1)
    raw = torch.frombuffer(bytearray(run.work.boundary(0, 1).read_bytes()), dtype=torch.bfloat16).view(3, 32, 64)
    table = load_file(run.source.path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(raw, table[run.windows[3:]])


def test_embeddings_are_scaled_as_the_model_scales_them(tiny_model: Callable[..., Path], sweep: SweepFactory) -> None:
    run = sweep(model=tiny_model("gemma3_text"))
    run.embed(1)
    raw = torch.frombuffer(bytearray(run.work.boundary(0, 1).read_bytes()), dtype=torch.bfloat16).view(3, 32, 64)
    table = load_file(run.source.path / "model.safetensors")["model.embed_tokens.weight"]
    # The root of the hidden size, 8, is a power of two: nothing is rounded.
    assert torch.equal(raw, 8 * table[run.windows[3:]])


def test_boundaries_hold_the_layer_s_outputs(sweep: SweepFactory) -> None:
    run = sweep()
    run.embed(0)
    run.layer(0, 0)
    X, Y = (
        torch.frombuffer(bytearray(run.work.boundary(i, 0).read_bytes()), dtype=torch.bfloat16).view(3, 32, 64)
        for i in (0, 1)
    )
    with torch.no_grad(), run.skeleton.layer(0, run.skeleton.load(run.source, 0)) as layer:
        assert torch.equal(Y[:2], run.skeleton.forward(layer, X[:2]))
        assert torch.equal(Y[2:], run.skeleton.forward(layer, X[2:]))


def test_last_layer_writes_no_boundary(sweep: SweepFactory) -> None:
    run = sweep()
    run.embed(0)
    run.layer(0, 0)
    run.layer(1, 0)
    names = set(run.files())
    assert "statistics-0001-0000.safetensors" in names
    assert "boundary-0002-0000.bin" not in names
    assert not [name for name in names if "part" in name]


def test_finished_steps_are_not_done_again(sweep: SweepFactory) -> None:
    run = sweep()
    for shard in (0, 1):
        run.embed(shard)
        run.layer(0, shard)
        run.layer(1, shard)
    stamps = {path: path.stat().st_mtime_ns for path in run.work.root.iterdir()}
    for shard in (0, 1):
        run.embed(shard)
        run.layer(0, shard)
        run.layer(1, shard)
    assert {path: path.stat().st_mtime_ns for path in run.work.root.iterdir()} == stamps


def test_step_with_half_of_its_outputs_is_done_again_with_the_same_bytes(sweep: SweepFactory) -> None:
    run = sweep()
    run.embed(0)
    run.layer(0, 0)
    before = run.files()
    for lost in (run.work.boundary(1, 0), run.work.statistics(0, 0)):
        lost.unlink()
        run.layer(0, 0)
        assert run.files() == before


def test_token_outside_the_embeddings_is_named(sweep: SweepFactory) -> None:
    run = sweep()
    run.windows[4, 7] = 259
    write_tokens(run.work, run.windows)
    run.embed(0)
    with pytest.raises(SourceError, match=r"token 259 is outside model\.embed_tokens\.weight with 259 rows"):
        run.embed(1)
    assert not run.work.boundary(0, 1).exists()


def overflowing(model: Path, layer: int, factor: float = 1e30) -> Path:
    """Make a layer whose weights are finite and whose activations are not, or their squares."""
    tensors = load_file(model / "model.safetensors")
    for name in (f"model.layers.{layer}.mlp.up_proj.weight", f"model.layers.{layer}.mlp.gate_proj.weight"):
        tensors[name] = tensors[name] * factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_activations_that_overflow_name_layer_and_site(own_model: Callable[..., Path], sweep: SweepFactory) -> None:
    run = sweep(model=overflowing(own_model(), 1))
    run.embed(0)
    run.layer(0, 0)
    with pytest.raises(CalibrationError, match="layer 1: activations at site mlp_out are NaN or Inf") as caught:
        run.layer(1, 0)
    assert caught.value.facts == {"layer": 1, "site": "mlp_out"}
    assert "statistics-0001-0000.safetensors" not in run.files()
    assert not [name for name in run.files() if "part" in name]


def test_squares_that_overflow_name_layer_and_site(
    own_model: Callable[..., Path], sweep: SweepFactory, recipe: Recipe
) -> None:
    recipe = replace(recipe, transform=replace(recipe.transform, smooth_statistic="rms"))
    run = sweep(model=overflowing(own_model(), 1, 1e12), with_recipe=recipe)
    run.embed(0)
    run.layer(0, 0)
    with pytest.raises(
        CalibrationError, match=r"layer 1: activations at site mlp_out .* their squares are Inf"
    ) as caught:
        run.layer(1, 0)
    assert caught.value.facts == {"layer": 1, "site": "mlp_out"}


def test_left_out_sites_are_not_recorded(sweep: SweepFactory, recipe: Recipe) -> None:
    run = sweep(with_recipe=replace(recipe, skip_linears=("mlp.down_proj",)))
    run.embed(0)
    run.layer(0, 0)
    assert set(load_statistics(run.work.statistics(0, 0), CPU)) == {"attn_in", "attn_out", "mlp_in"}
