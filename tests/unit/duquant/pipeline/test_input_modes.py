"""What a layer is calibrated on: independent layers, chains, stages, refinement passes."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from duquant.artifact import verify
from duquant.calibration.statistics import StatisticsRecorder, load_statistics
from duquant.calibration.sweep import read_tokens, shard_windows
from duquant.config import LearningConfig, Recipe, WeightConfig, preset
from duquant.errors import ScratchError
from duquant.inference import load
from duquant.models.families import architecture_of
from duquant.pipeline import ModelRun, Progress, StepId, quantize_model

CPU = torch.device("cpu")
LAYERS = 3

Model = Callable[..., Path]


def in_mode(recipe: Recipe, mode: str, passes: int = 0) -> Recipe:
    return replace(recipe, input_mode=mode, refine_passes=passes)


def shards_of(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("model-*.safetensors")}


@pytest.fixture(scope="module")
def made(
    tiny_model: Model, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], dict[str, str]]:
    """The shards' digests of a three-layer model, by mode and passes; each is made once."""
    known: dict[tuple[str, int], dict[str, str]] = {}

    def make(mode: str, passes: int = 0) -> dict[str, str]:
        if (mode, passes) not in known:
            out = tmp_path_factory.mktemp("mode") / "out"
            model = tiny_model(num_hidden_layers=LAYERS)
            quantize_model(str(model), out, in_mode(recipe, mode, passes), device="cpu")
            assert verify(out).ok
            known[mode, passes] = shards_of(out)
        return known[mode, passes]

    return make


Made = Callable[..., dict[str, str]]


def test_as_many_stages_as_layers_give_the_bytes_of_independent_layers(made: Made) -> None:
    assert made("staged:3") == made("staged:9") == made("fp")


def test_one_stage_gives_the_bytes_of_the_quantized_chain(made: Made) -> None:
    assert made("staged:1") == made("quantized")


def test_layers_that_see_unquantized_inputs_are_the_same_in_all_modes_and_no_others(made: Made) -> None:
    modes = {"quantized": {0}, "staged:2": {0, 2}}
    for mode, starts in modes.items():
        same = {layer for layer in range(LAYERS) if made(mode)[name(layer)] == made("fp")[name(layer)]}
        assert same == starts


def name(layer: int) -> str:
    return f"model-layer-{layer:04d}.safetensors"


def test_each_refinement_pass_settles_one_more_layer_until_all_are_those_of_the_chain(made: Made) -> None:
    for passes in (1, 2):
        refined = made("fp", passes)
        settled = [refined[name(layer)] == made("quantized")[name(layer)] for layer in range(LAYERS)]
        assert settled == [layer <= passes for layer in range(LAYERS)]
    assert made("staged:2", 1) == made("quantized")


class Seen:
    """Statistics of unquantized layers, fed with what the layers of a loaded artifact see."""

    def __init__(self, run: ModelRun, artifact: Path) -> None:
        self.run = run
        self.model, _ = load(artifact)

    @torch.no_grad()
    def inputs(self, layer: int, shard: int) -> list[Tensor]:
        """Return what enters a layer of the artifact, one window at a time, as transformers runs it."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).clone())

        hook = self.model.model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
        calibration = self.run.recipe.calibration
        windows = shard_windows(calibration)[shard]
        for tokens in read_tokens(self.run.work, windows, calibration.seq_len).split(calibration.micro_batch):
            self.model(tokens, use_cache=True)
        hook.remove()
        return found

    @torch.no_grad()
    def statistics(self, layer: int, shard: int) -> dict[str, Any]:
        """Return the statistics of the unquantized layer on these inputs."""
        run = self.run
        recorder = StatisticsRecorder(
            architecture_of(run.source.config).kept_sites((), layer),
            row_stride=run.recipe.calibration.samples * run.recipe.calibration.seq_len // 48,
        )
        skeleton = run._skeleton
        with skeleton.layer(layer, skeleton.load(run._model, layer)) as module, recorder.attached(module):
            for X in self.inputs(layer, shard):
                skeleton.forward(module, X)
        return recorder.finish()


FAMILIES = ("llama", "qwen2", "gemma3_text", "mixtral")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_statistics_are_those_of_the_artifact_s_own_layers(
    tiny_model: Model, recipe: Recipe, tmp_path: Path, model_type: str
) -> None:
    kv_cache = replace(recipe.kv_cache, sink_tokens=3)
    assert_statistics_of_artifact(tiny_model(model_type), replace(recipe, kv_cache=kv_cache), tmp_path)


@pytest.mark.parametrize("name", ["gptq", "quarot", "spinquant", "atom", "duquant-gptq"])
def test_statistics_are_those_of_the_artifact_whatever_the_preset(
    tiny_model: Model, recipe: Recipe, tmp_path: Path, name: str
) -> None:
    """16-bit activations and cache; symmetric grids; a rotated residual stream; outlier channels and groups; keys
    that are smoothed."""
    learning = LearningConfig(samples=2, seq_len=16, epochs=1)
    chosen = replace(preset(name), calibration=recipe.calibration, learning=learning)
    if chosen.outlier_channels:
        chosen = replace(chosen, outlier_channels=16)  # the model has 64
    assert_statistics_of_artifact(tiny_model(), chosen, tmp_path)


def assert_statistics_of_artifact(model: Path, recipe: Recipe, folder: Path) -> None:
    """Compare what layer 1 was quantized from with what the artifact's layer 0 gives."""
    chosen, out = in_mode(recipe, "quantized"), folder / "out"
    quantize_model(str(model), out, chosen, device="cpu")
    run = ModelRun(model, chosen, folder / "work", device=CPU)
    (folder / "steps").mkdir()
    for step in run.steps():
        run.do(step.id, folder / "steps")
    assert shards_of(folder / "steps") == shards_of(out)
    seen = Seen(run, out)
    for shard in range(run.shards):
        recorded = load_statistics(run.work.statistics(1, shard), CPU)
        expected = seen.statistics(1, shard)
        assert set(recorded) == set(expected)
        for site, each in expected.items():
            assert torch.equal(recorded[site].absmax, each.absmax)
            assert torch.equal(recorded[site].rows, each.rows)


def test_inputs_to_learn_on_are_those_of_the_chain(tiny_model: Model, recipe: Recipe, tmp_path: Path) -> None:
    chosen = replace(
        in_mode(recipe, "quantized"),
        weight=WeightConfig(clip="learned"),
        learning=LearningConfig(samples=6, seq_len=16, epochs=1),
    )
    run = ModelRun(tiny_model(), chosen, tmp_path, device=CPU)
    for step in (step.id for step in run.steps()):
        if step.kind == "observe":
            raw = bytearray(run.work.chain(1, step.shard).read_bytes())
            X = torch.frombuffer(raw, dtype=torch.bfloat16).view(3, 32, 64)
            run.do(step, tmp_path)
            assert torch.equal(load_file(run.work.inputs(1, step.shard))["inputs"], X[:, :16])
        else:
            run.do(step, tmp_path)


@pytest.mark.parametrize(("mode", "passes"), [("quantized", 0), ("staged:2", 0), ("fp", 1)])
def test_a_run_may_stop_after_any_step_and_goes_on_with_what_is_missing(
    made: Made, tiny_model: Model, recipe: Recipe, tmp_path: Path, mode: str, passes: int
) -> None:
    """Every step by a fresh process; before each, the plan is made anew from the files that are there."""
    model, chosen = tiny_model(num_hidden_layers=LAYERS), in_mode(recipe, mode, passes)
    finished: set[int] = set()
    done: list[StepId] = []
    while left := ModelRun(model, chosen, tmp_path / "work", device=CPU).steps(frozenset(finished)):
        run = ModelRun(model, chosen, tmp_path / "work", device=CPU)
        # Steps that leave no file behind are looked at again, and cost nothing.
        step = next(step.id for step in left if step.id not in done)
        run.do(step, tmp_path)
        done.append(step)
        if step.kind in ("quantize", "extra"):
            finished.add(step.layer)
        if step.kind == "quantize":
            run.forget(step.layer)
    assert len(done) == len(ModelRun(model, chosen, tmp_path / "empty", device=CPU).steps())
    assert shards_of(tmp_path) == made(mode, passes)


@pytest.mark.parametrize(("mode", "passes"), [("quantized", 0), ("staged:2", 0), ("fp", 1)])
def test_the_work_folder_holds_few_files_at_a_time(
    tiny_model: Model, recipe: Recipe, tmp_path: Path, mode: str, passes: int
) -> None:
    run = ModelRun(tiny_model(num_hidden_layers=5), in_mode(recipe, mode, passes), tmp_path / "work", device=CPU)
    most: dict[str, int] = {}
    for step in run.steps():
        run.do(step.id, tmp_path)
        if step.id.kind == "quantize":
            run.forget(step.id.layer)
        files = [path.name.split("-")[0] for path in run.work.root.rglob("*-*") if path.is_file()]
        most = {kind: max(most.get(kind, 0), files.count(kind)) for kind in {*most, *files}}
    stages = len(run.recipe.stages(5))
    # For each shard one file in each chain; a step writes the next one before it deletes the last.
    chains = 1 if passes else stages
    assert most.get("chain", 0) <= run.shards * chains + 1
    assert most["boundary"] <= run.shards * (1 if passes else stages) + 1
    assert not [*run.work.root.rglob("statistics-*"), *run.work.root.rglob("chain-*")]
    if not passes:
        assert most["packed"] <= 2 * stages


def test_a_broken_packed_layer_is_deleted_and_named(tiny_model: Model, recipe: Recipe, tmp_path: Path) -> None:
    run = ModelRun(tiny_model(), in_mode(recipe, "quantized"), tmp_path / "work", device=CPU)
    steps = [step.id for step in run.steps()]
    for step in steps[: steps.index(StepId("propagate", 0, 0))]:
        run.do(step, tmp_path)
    kept = tmp_path / "kept"
    shutil.copy(run.packed(0), kept)
    run.packed(0).write_bytes(b"cut")
    with pytest.raises(ScratchError, match="cannot read the quantized layer"):
        run.propagate(0, 0)
    assert not run.packed(0).exists()
    with pytest.raises(ScratchError, match="cannot read the quantized layer"):
        run.propagate(0, 0)
    shutil.copy(kept, run.packed(0))
    run.propagate(0, 0)
    assert run.work.chain(1, 0).exists()


def test_progress_counts_the_layers_of_all_passes(tiny_model: Model, recipe: Recipe, tmp_path: Path) -> None:
    seen: list[Progress] = []
    chosen = in_mode(recipe, "staged:2", 1)
    model = tiny_model(num_hidden_layers=LAYERS)
    quantize_model(str(model), tmp_path / "out", chosen, device="cpu", on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].phase, seen[-1].done, seen[-1].total) == ("finish", 5, 5)


def test_left_out_sites_run_in_16_bits_in_the_chain(tiny_model: Model, recipe: Recipe, tmp_path: Path) -> None:
    chosen = replace(in_mode(recipe, "quantized"), skip_linears=("mlp.down_proj",))
    assert verify(quantize_model(str(tiny_model()), tmp_path / "out", chosen, device="cpu").artifact).ok
