"""Learning on a layer's output: never worse than the start, the same every time, and honest about losses gone wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duquant.calibration.statistics import SiteStatistics, StatisticsRecorder
from duquant.config import ActivationConfig, LearningConfig, Recipe, TransformConfig, WeightConfig
from duquant.errors import CalibrationError
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.folds import LayerShape
from duquant.pipeline.layer import QuantizedLayer, quantize_layer
from duquant.pipeline.learning import LayerSamples, _Learner

CPU = torch.device("cpu")
LEARNING = LearningConfig(samples=4, seq_len=24, epochs=4, clip_rate=0.03)
SMOOTHED = TransformConfig(smooth_alpha=0.5, smooth_learned=True)


class Case:
    """One layer of a tiny model, its statistics, and inputs to learn on."""

    def __init__(self, path: Path) -> None:
        source = SourceCheckpoint(path)
        self.skeleton = Skeleton(source, CPU)
        self.tensors = self.skeleton.load(source, 0)
        self.shape = LayerShape(kv_heads=self.skeleton.kv_heads, head_dim=self.skeleton.head_dim)
        hidden = source.config["hidden_size"]
        self.inputs = torch.randn(4, 24, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
        recorder = StatisticsRecorder(LLAMA.sites, row_stride=1, mean_squares=True)
        with torch.no_grad(), self.skeleton.layer(0, self.tensors) as module, recorder.attached(module):
            self.skeleton.forward(module, self.inputs)
        self.statistics: dict[str, SiteStatistics] = recorder.finish()

    def quantize(self, recipe: Recipe, **changes: Any) -> QuantizedLayer:
        samples = LayerSamples(self.skeleton, self.inputs)
        arguments = {"samples": samples, "layer": 0, **changes}
        return quantize_layer(self.tensors, self.statistics, LLAMA, self.shape, recipe, **arguments)


@pytest.fixture
def make_case(tiny_model: Callable[..., Path]) -> Callable[..., Case]:
    """Factory of cases: make_case("qwen2", num_key_value_heads=1)."""
    return lambda *args, **kwargs: Case(tiny_model(*args, **kwargs))


@pytest.fixture
def learning(recipe: Recipe) -> Recipe:
    """The recipe of all tests with learned clips."""
    return replace(recipe, weight=WeightConfig(clip="learned"), learning=LEARNING)


@pytest.mark.parametrize("is_smoothed", [False, True], ids=["clips", "scales"])
@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("qwen2", {"num_key_value_heads": 1}), ("qwen3", {})], ids=str
)
def test_learning_lowers_the_layer_s_error(
    make_case: Callable[..., Case], learning: Recipe, model_type: str, changes: dict[str, Any], is_smoothed: bool
) -> None:
    """Clips are learned for weights alone: of so few channels, rounded activations drown what they gain."""
    chosen = {"transform": SMOOTHED} if is_smoothed else {"activation": ActivationConfig(bits=16)}
    report = make_case(model_type, **changes).quantize(replace(learning, **chosen)).learning  # type: ignore[arg-type]
    assert report is not None
    assert 0 < report.loss_after < 0.97 * report.loss_before
    assert 1 <= report.epochs <= LEARNING.epochs
    assert not report.is_restored


def test_learned_clips_err_less_than_a_fixed_clip_of_the_same_start(
    make_case: Callable[..., Case], learning: Recipe
) -> None:
    """The shard itself: its dequantized weights, not the learner's own loss."""
    case = make_case()
    fine = replace(learning, activation=ActivationConfig(bits=16), learning=replace(LEARNING, epochs=8))
    start = replace(fine, weight=WeightConfig(clip="fixed", clip_ratio=float(torch.tensor(4.0).sigmoid())))
    learned, fixed = case.quantize(fine).report, case.quantize(start).report
    assert sum(site.output_nmse for site in learned.values()) < sum(site.output_nmse for site in fixed.values())


@pytest.mark.parametrize("transform", [None, SMOOTHED], ids=["clips", "scales"])
def test_the_same_bytes_every_time_and_another_seed_another_order(
    make_case: Callable[..., Case], learning: Recipe, transform: TransformConfig | None
) -> None:
    recipe = replace(learning, transform=transform or learning.transform)
    case = make_case()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = case.quantize(recipe)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = make_case().quantize(recipe)
    assert set(first.tensors) == set(second.tensors)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert first.learning == second.learning
    assert first.learning != case.quantize(replace(recipe, seed=recipe.seed + 1)).learning


def test_arguments_are_left_alone(make_case: Callable[..., Case], learning: Recipe) -> None:
    case = make_case("qwen2")
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    inputs = case.inputs.clone()
    case.quantize(replace(learning, transform=SMOOTHED))
    assert all(torch.equal(case.tensors[name], tensor) for name, tensor in before.items())
    assert torch.equal(case.inputs, inputs)


def test_left_out_linears_are_not_learned(make_case: Callable[..., Case], learning: Recipe) -> None:
    result = make_case().quantize(replace(learning, skip_linears=("mlp.down_proj",)))
    assert "mlp.down_proj.weight" in result.tensors
    assert result.learning is not None
    nothing = make_case().quantize(replace(learning, skip_linears=LLAMA.linears_of(0)))
    assert nothing.learning is None


def test_learning_stops_when_the_loss_stays(make_case: Callable[..., Case], learning: Recipe) -> None:
    lazy = replace(LEARNING, epochs=50, clip_rate=1e-6, patience=2)
    report = make_case().quantize(replace(learning, learning=lazy)).learning
    assert report is not None
    assert report.epochs < 10


def test_a_loss_that_is_not_finite_restores_the_best_and_says_so(
    make_case: Callable[..., Case], learning: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The parameters turn to NaN in the third epoch, as after an overflow in a gradient."""
    steps, step = [0], _Learner.step

    def step_that_breaks(self: _Learner, loss: torch.Tensor) -> None:
        step(self, loss)
        steps[0] += 1
        if steps[0] == 2 * len(case.inputs) + 1:
            self.restore([torch.full_like(value, torch.nan) for value in self.values()])

    case = make_case()
    expected = case.quantize(replace(learning, learning=replace(LEARNING, epochs=2, patience=4)))
    monkeypatch.setattr(_Learner, "step", step_that_breaks)
    result = case.quantize(replace(learning, learning=replace(LEARNING, epochs=9, patience=4)))
    assert result.learning is not None
    assert result.learning.is_restored
    assert result.metrics["learning"]["is_restored"] == 1.0
    assert "NaN or Inf while learning" in caplog.text
    assert all(torch.equal(result.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_a_loss_that_is_not_finite_at_the_start_is_an_error(make_case: Callable[..., Case], learning: Recipe) -> None:
    case = make_case()
    case.inputs[1, 3] = torch.inf
    with pytest.raises(CalibrationError, match=r"layer 0: the loss is .* before anything is learned"):
        case.quantize(learning)


def test_missing_inputs_are_named(make_case: Callable[..., Case], learning: Recipe) -> None:
    with pytest.raises(CalibrationError, match="layer 0: the recipe learns, and the calibration kept no inputs"):
        make_case().quantize(learning, samples=None)
