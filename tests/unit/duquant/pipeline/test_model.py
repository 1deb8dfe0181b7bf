"""quantize_model: whole or absent, and the same bytes every time."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from duquant.artifact import read_manifest, verify
from duquant.config import CalibrationConfig, LearningConfig, Recipe, TextSource, WeightConfig, preset
from duquant.errors import (
    CalibrationError,
    ConfigError,
    DuQuantError,
    KernelUnavailableError,
    SourceError,
    UnsupportedModelError,
)
from duquant.models.devices import resolve_device
from duquant.pipeline import ModelRun, Progress, ShardOutcome, StepId, plan, quantize_model

CPU = torch.device("cpu")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_same_model_and_recipe_give_the_same_bytes(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path, model_type: str
) -> None:
    model = str(tiny_model(model_type))
    first = quantize_model(model, tmp_path / "a", recipe, device="cpu")
    torch.manual_seed(1234)
    second = quantize_model(model, tmp_path / "b", recipe, device="cpu")
    assert digests(first.artifact) == digests(second.artifact)
    assert first.fingerprint == second.fingerprint


FAMILY = ("awq", "omniquant", "quarot", "quarot-rtn", "duquant-compat", "duquant-lwc-adamw")


@pytest.mark.parametrize("name", FAMILY)
def test_presets_of_the_family_make_intact_artifacts(
    tiny_artifact: Callable[..., Any], calibration: CalibrationConfig, name: str
) -> None:
    learning = LearningConfig(samples=2, seq_len=16, epochs=1)
    chosen = replace(preset(name), calibration=calibration, learning=learning)
    path = tiny_artifact(with_recipe=chosen).artifact
    assert verify(path).ok
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    assert all(("learning" in layer) is chosen.learns_by_layer for layer in report["layers"].values())


def test_learning_gives_the_same_bytes_and_leaves_no_inputs_behind(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    chosen = replace(
        recipe, weight=WeightConfig(clip="learned"), learning=LearningConfig(samples=3, seq_len=16, epochs=1)
    )
    shards = []
    for name, order in (("forward", 1), ("backward", -1)):
        run = ModelRun(tiny_model(), chosen, tmp_path / name, device=CPU)
        steps = [step.id for step in plan(layers=2, shards=run.shards)]
        for step in (step for step in steps if step.kind != "quantize"):
            run.do(step, tmp_path)
        assert len(list(run.work.root.glob("inputs-*"))) == 2 * run.shards
        for step in [step for step in steps if step.kind == "quantize"][::order]:
            run.do(step, tmp_path / name)
            run.forget(step.layer)
        assert list(run.work.root.glob("inputs-*")) == []
        shards.append({n: d for n, d in file_digests(tmp_path / name).items() if n.endswith("safetensors")})
    assert shards[0] == shards[1]
    assert len(shards[0]) == 2


def file_digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file()}


def test_sharding_of_the_source_does_not_matter(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any]
) -> None:
    single, sharded = tiny_artifact(tiny_model()), tiny_artifact(tiny_model(shard_size="20KB"))
    assert single.fingerprint == sharded.fingerprint
    shards = [{n: d for n, d in digests(s.artifact).items() if n.endswith("safetensors")} for s in (single, sharded)]
    assert shards[0] == shards[1]


def test_other_seed_gives_other_rotations_and_another_fingerprint(
    tiny_artifact: Callable[..., Any], recipe: Recipe
) -> None:
    first, second = tiny_artifact(), tiny_artifact(with_recipe=replace(recipe, seed=recipe.seed + 1))
    assert first.fingerprint != second.fingerprint
    name = "model-layer-0000.safetensors"
    assert digests(first.artifact)[name] != digests(second.artifact)[name]


def test_other_name_gives_the_same_fingerprint_and_shards(tiny_artifact: Callable[..., Any], recipe: Recipe) -> None:
    first = tiny_artifact()
    second = tiny_artifact(with_recipe=replace(recipe, name="other"))
    assert first.fingerprint == second.fingerprint
    assert first.artifact != second.artifact
    shards = [{n: d for n, d in digests(s.artifact).items() if n.endswith("safetensors")} for s in (first, second)]
    assert shards[0] == shards[1]


def test_artifact_is_complete_and_verified(tiny_artifact: Callable[..., Any]) -> None:
    summary = tiny_artifact()
    names = {path.name for path in summary.artifact.iterdir()}
    assert names >= {
        "config.json",
        "manifest.json",
        "model-extra.safetensors",
        "model-layer-0000.safetensors",
        "model-layer-0001.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    report = verify(summary.artifact)
    assert report.ok, report.problems
    assert summary.layers == 2
    assert summary.size_bytes == sum(path.stat().st_size for path in summary.artifact.iterdir())
    manifest = read_manifest(summary.artifact)
    assert manifest.fingerprint == summary.fingerprint
    assert manifest.source["layers"] == 2


def test_index_names_every_tensor_in_the_file_that_holds_it(tiny_artifact: Callable[..., Any]) -> None:
    artifact = tiny_artifact().artifact
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for path in artifact.glob("*.safetensors"):
        with safe_open(path, framework="pt") as reader:
            held.update(dict.fromkeys(reader.keys(), path.name))
    assert index["weight_map"] == held


def test_seed_drawn_text_leaves_no_path_behind(tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path) -> None:
    source = TextSource(kind="random")
    chosen = replace(recipe, calibration=replace(recipe.calibration, source=source))
    assert verify(quantize_model(str(tiny_model()), tmp_path / "out", chosen, device="cpu").artifact).ok


@pytest.mark.parametrize("kind", ["file in it", "file", "hidden"])
def test_out_that_is_not_empty_is_refused(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / ("precious" if kind == "file in it" else ".precious")).write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty directory") as caught:
        quantize_model(str(tiny_model()), out, recipe, device="cpu")
    assert caught.value.facts["field"] == "out"
    assert out.exists()


def test_empty_out_is_filled_and_parents_are_made(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
        assert verify(quantize_model(str(tiny_model()), out, recipe, device="cpu").artifact).ok


class StopHereError(Exception):
    """Stands for a kill in the middle."""


@pytest.mark.parametrize("stop_at", ["tokenize layer -1", "sweep layer 0", "sweep layer 1", "quantize layer 1"])
def test_run_that_stops_in_the_middle_leaves_nothing(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path, stop_at: str
) -> None:
    def stop(progress: Progress) -> None:
        assert not (tmp_path / "out").exists()
        if progress.message == stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        quantize_model(str(tiny_model()), tmp_path / "out", recipe, device="cpu", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_all_layers(tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path) -> None:
    seen: list[Progress] = []
    quantize_model(str(tiny_model()), tmp_path / "out", recipe, device="cpu", on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].phase, seen[-1].done, seen[-1].total) == ("finish", 2, 2)


def test_bad_text_and_bad_models_leave_nothing(own_model: Callable[..., Path], recipe: Recipe, tmp_path: Path) -> None:
    model, out = own_model(intermediate_size=94), tmp_path / "out"  # 94 = 2 * 47: no group size suits it
    missing = TextSource(kind="file", name=str(tmp_path / "absent.txt"))
    cases: list[tuple[type[DuQuantError], Recipe]] = [
        (CalibrationError, replace(recipe, calibration=replace(recipe.calibration, source=missing))),
        (CalibrationError, replace(recipe, calibration=replace(recipe.calibration, seq_len=100_000))),
        (UnsupportedModelError, replace(recipe, skip_linears=("mlp.up_proj",))),
        (ConfigError, replace(recipe, weight=WeightConfig(group_size=40))),
    ]
    for error, chosen in cases:
        with pytest.raises(error):
            quantize_model(str(model), out, chosen, device="cpu")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        quantize_model(str(model), out, recipe, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_absent_model_is_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no model directory 'no/such'"):
        quantize_model("no/such", tmp_path / "out", recipe, device="cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "cpu:3x", "", "cuda:-1"])
def test_unknown_device_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one of: auto, cpu, cuda, cuda:N"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_says_so() -> None:
    with pytest.raises(KernelUnavailableError, match="finds no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def run_steps(run: ModelRun, out: Path, order: list[StepId]) -> list[ShardOutcome]:
    done = (run.do(step, out) for step in order)
    return [outcome for outcome in done if outcome is not None]


def test_order_of_the_steps_does_not_matter(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], recipe: Recipe, tmp_path: Path
) -> None:
    """Depth first over the shards, last layer first, every layer by a fresh worker, outcomes through JSON."""
    model, out = tiny_model(), tmp_path / "out"
    out.mkdir()
    steps = plan(layers=2, shards=2)
    order = sorted(
        (step.id for step in steps),
        key=lambda s: (
            (["tokenize", "embed", "sweep", "quantize", "extra"].index(s.kind), -s.shard, s.layer)
            if s.kind != "quantize"
            else (3, -s.layer, 0)
        ),
    )
    outcomes = []
    for step in order:
        fresh = ModelRun(model, recipe, tmp_path / "work", device=CPU)
        outcomes += run_steps(fresh, out, [step])
    travelled = [ShardOutcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) for outcome in outcomes]
    assert travelled == outcomes
    manifest = ModelRun(model, recipe, tmp_path / "work", device=CPU).finish(out, travelled, name=str(model))
    reference = tiny_artifact(model, recipe)
    assert manifest == read_manifest(reference.artifact)
    expected = digests(reference.artifact)
    del expected["manifest.json"]
    assert digests(out) == expected


def test_run_that_was_interrupted_goes_on_in_the_same_folder(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], recipe: Recipe, tmp_path: Path
) -> None:
    model, out, work = tiny_model(), tmp_path / "out", tmp_path / "work"
    out.mkdir()
    steps = [step.id for step in plan(layers=2, shards=2)]
    for stop in range(1, len(steps)):
        # A new process starts from the first step each time; finished ones cost nothing or little.
        run_steps(ModelRun(model, recipe, work, device=CPU), out, steps[:stop])
    outcomes = run_steps(ModelRun(model, recipe, work, device=CPU), out, steps)
    assert {o.shard.name: o.shard.sha256 for o in outcomes} == {
        name: digest for name, digest in digests(tiny_artifact().artifact).items() if name.endswith(".safetensors")
    }


def test_finished_layers_are_not_needed_to_go_on(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], recipe: Recipe, tmp_path: Path
) -> None:
    """The work folder is lost; layer 0 and the extra shard are committed."""
    model, out = tiny_model(), tmp_path / "out"
    out.mkdir()
    rest = [step.id for step in plan(layers=2, shards=2, finished_layers=frozenset({-1, 0}))]
    (outcome,) = run_steps(ModelRun(model, recipe, tmp_path / "work", device=CPU), out, rest)
    assert outcome.shard.sha256 == digests(tiny_artifact().artifact)["model-layer-0001.safetensors"]


def test_work_folder_does_not_grow_with_the_layers(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    run = ModelRun(tiny_model(num_hidden_layers=4), recipe, tmp_path / "work", device=CPU)
    out = tmp_path / "out"
    out.mkdir()
    for step in plan(layers=4, shards=2):
        run_steps(run, out, [step.id])
        if step.id.kind == "quantize":
            run.forget(step.id.layer)
            names = [path.name for path in (tmp_path / "work").iterdir()]
            assert len([name for name in names if name.startswith("boundary")]) <= 2
            assert not [name for name in names if name.startswith("statistics")]


def test_source_in_float32_or_float16_is_accepted(
    own_model: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    model = own_model()
    tensors = load_file(model / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        converted = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(converted, model / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / str(dtype)
        assert verify(quantize_model(str(model), out, recipe, device="cpu").artifact).ok


def test_more_shards_than_samples_are_fewer_shards(
    tiny_model: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    few = CalibrationConfig(source=recipe.calibration.source, samples=1, seq_len=16, shards=8, search_tokens=16)
    chosen = replace(recipe, calibration=few)
    assert verify(quantize_model(str(tiny_model()), tmp_path / "out", chosen, device="cpu").artifact).ok
