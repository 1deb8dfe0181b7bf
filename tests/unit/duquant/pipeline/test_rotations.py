"""Rotations of the residual stream: learned ones are orthogonal, lose less than the start, and are always the same."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from duquant.artifact import verify
from duquant.config import (
    ActivationConfig,
    CalibrationConfig,
    KVCacheConfig,
    LearningConfig,
    Recipe,
    TransformConfig,
    WeightConfig,
    preset,
)
from duquant.errors import CalibrationError, UnsupportedModelError
from duquant.inference import load
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline import ModelRun, StepId, plan
from duquant.pipeline.epochs import LearningReport
from duquant.pipeline.rotations import (
    ResidualRotations,
    _Learner,
    learn_rotations,
    learning_tokens,
    rotate_first,
    start_rotations,
)
from duquant.transforms.cayley import orthogonality_error
from duquant.transforms.hadamard import flat_orthogonal

CPU = torch.device("cpu")
LEARNING = LearningConfig(samples=3, seq_len=24, epochs=4, patience=4, rotation_rate=0.5)
TOKENS = torch.randint(3, 259, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def spinquant(calibration: CalibrationConfig) -> Recipe:
    """The preset with a small budget."""
    return replace(preset("spinquant"), calibration=calibration, learning=LEARNING)


class Case:
    """A tiny model and its start."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.source, self.recipe = SourceCheckpoint(path), recipe
        self.skeleton = Skeleton(self.source, CPU)
        self.start = start_rotations(recipe, hidden=64, layers=2, head_dim=self.skeleton.head_dim)

    def learner(self, rotations: ResidualRotations | None = None) -> _Learner:
        return _Learner(self.source, self.skeleton, self.recipe, rotations or self.start)

    def learn(self) -> tuple[ResidualRotations, LearningReport]:
        return learn_rotations(self.source, self.skeleton, self.recipe, self.start, TOKENS)

    def mean_loss(self, rotations: ResidualRotations) -> float:
        learner = self.learner(rotations)
        return sum(learner.loss(sample) for sample in TOKENS) / len(TOKENS)


@pytest.fixture
def make_case(tiny_model: Callable[..., Path], spinquant: Recipe) -> Callable[..., Case]:
    """Factory of cases: make_case("qwen2", recipe)."""
    return lambda model_type="llama", recipe=None: Case(tiny_model(model_type), recipe or spinquant)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "mixtral"])
def test_learned_rotations_lose_less_than_the_start_and_stay_orthogonal(
    make_case: Callable[..., Case], model_type: str
) -> None:
    case = make_case(model_type)
    rotations, report = case.learn()
    assert report.loss_after < report.loss_before - 0.002
    assert report.loss_before == pytest.approx(case.mean_loss(case.start))
    assert report.loss_after == pytest.approx(case.mean_loss(rotations))
    assert orthogonality_error(rotations.R1) < 1e-12
    assert orthogonality_error(rotations.R2) < 1e-12
    assert float((rotations.R1 - case.start.R1).abs().max()) > 1e-3
    assert not report.is_restored


def test_a_rotation_of_nothing_that_is_rounded_stays(make_case: Callable[..., Case], spinquant: Recipe) -> None:
    """o_proj and the cache keep 16 bits, so R2 has no part in the loss."""
    left_out = replace(spinquant, skip_linears=("self_attn.o_proj",), kv_cache=KVCacheConfig(bits=16))
    case = make_case("llama", replace(left_out, learning=replace(LEARNING, rotation_rate=1.0)))
    rotations, _ = case.learn()
    assert torch.equal(rotations.R2, case.start.R2)
    assert not torch.equal(rotations.R1, case.start.R1)


def test_without_rounding_the_loss_is_the_model_s_own(make_case: Callable[..., Case], spinquant: Recipe) -> None:
    """The network that is learned on is the model, its activations and cache apart: whatever the rotations are."""
    # Nothing could be learned without rounding, and such a recipe is refused: these rotations stay as they are.
    transform = replace(spinquant.transform, residual_rotation="hadamard")
    exact = replace(
        spinquant, transform=transform, activation=ActivationConfig(bits=16), kv_cache=KVCacheConfig(bits=16)
    )
    case = make_case("qwen2", exact)
    model = AutoModelForCausalLM.from_pretrained(case.source.path, dtype=torch.float32)
    with torch.no_grad():
        expected = [float(model(sample[None], labels=sample[None]).loss) for sample in TOKENS]
    learner = case.learner()
    assert [learner.loss(sample) for sample in TOKENS] == pytest.approx(expected, rel=0.003)
    rounded = make_case("qwen2", replace(exact, activation=ActivationConfig(bits=2))).learner()
    assert rounded.loss(TOKENS[1]) != pytest.approx(expected[1], rel=0.006)


def test_only_rounding_gives_a_gradient_along_the_manifold(make_case: Callable[..., Case], spinquant: Recipe) -> None:
    """Without rounding no rotation changes the loss; 8-bit activations round little."""
    fine = replace(spinquant, activation=ActivationConfig(bits=8), kv_cache=KVCacheConfig(bits=16))
    learner = make_case("llama", fine).learner()
    loss = learner.differentiate(TOKENS[0])
    assert loss == pytest.approx(learner.loss(TOKENS[0]))
    assert learner._R1.grad is not None
    assert learner._R2.grad is not None
    tangent = learner._R1.grad.double() @ learner.rotations.R1.T
    assert float((tangent - tangent.T).norm()) < 0.2 * float(tangent.norm())


def test_rotations_are_the_same_every_time_and_others_with_another_seed(
    make_case: Callable[..., Case], spinquant: Recipe
) -> None:
    state = torch.get_rng_state()
    short = replace(spinquant, learning=replace(LEARNING, epochs=1))
    first, report = make_case("llama", short).learn()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    again, second = make_case("llama", short).learn()
    assert torch.equal(first.R1, again.R1)
    assert torch.equal(first.R2, again.R2)
    assert report == second
    other, _ = make_case("llama", replace(short, seed=1)).learn()
    assert not torch.equal(first.R1, other.R1)


def test_a_loss_that_is_not_finite_restores_the_best_and_says_so(
    make_case: Callable[..., Case],
    spinquant: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rotations turn to NaN in the second epoch, as after an overflow in a gradient."""
    steps, step = [0], _Learner.step

    def step_that_breaks(self: _Learner, rate: float) -> None:
        step(self, rate)
        steps[0] += 1
        if steps[0] == len(TOKENS) + 1:
            self.restore([torch.full_like(value, torch.nan) for value in self.values()])

    monkeypatch.setattr(_Learner, "step", step_that_breaks)
    case = make_case()
    rotations, report = case.learn()
    assert report.is_restored
    assert report.epochs == 1
    assert "NaN or Inf while rotations were learned" in caplog.text
    assert orthogonality_error(rotations.R1) < 1e-12
    assert case.mean_loss(rotations) == pytest.approx(report.loss_after)


def test_a_loss_that_is_not_finite_at_the_start_is_an_error(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(_self: Skeleton, tokens: torch.Tensor, _table: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, 64), torch.inf).bfloat16()

    monkeypatch.setattr(Skeleton, "embed", infinite)
    with pytest.raises(CalibrationError, match="loss is nan before any rotation is learned"):
        make_case().learn()


def test_the_start_rotates_values_for_o_proj_and_for_the_cache(spinquant: Recipe) -> None:
    """With the cache's own Hadamard matrix on top of it, R2 is still no identity up to signs, nor is it by itself."""
    start = start_rotations(spinquant, hidden=64, layers=3, head_dim=16)
    assert orthogonality_error(start.R1) < 1e-12
    torch.testing.assert_close(start.R1.abs(), torch.full_like(start.R1, 1 / 8))
    for R2 in (start.R2, start.R2 @ flat_orthogonal(16)):
        assert float(R2.abs().max()) < 0.95
    assert not torch.equal(start.R2[0], start.R2[1])
    plain = start_rotations(replace(spinquant, kv_cache=KVCacheConfig(bits=16)), hidden=64, layers=3, head_dim=16)
    torch.testing.assert_close(plain.R2.abs(), torch.full_like(plain.R2, 1 / 4))


def test_the_rotate_step_comes_before_everything_but_the_tokens() -> None:
    steps = rotate_first(plan(layers=2, shards=2))
    assert [step.id.kind for step in steps[:2]] == ["tokenize", "rotate"]
    assert all(StepId("rotate") in step.needs for step in steps[2:])
    assert len({step.id for step in steps}) == len(steps)
    assert rotate_first([]) == []
    resumed = rotate_first(plan(layers=2, shards=2, finished_layers=frozenset({0, 1})))
    assert [step.id.kind for step in resumed] == ["tokenize", "rotate", "extra"]


def test_a_second_try_takes_the_rotations_that_are_there(
    tiny_model: Callable[..., Path], spinquant: Recipe, tmp_path: Path
) -> None:
    run = ModelRun(tiny_model(), spinquant, tmp_path, device=CPU)
    run.do(StepId("tokenize"), tmp_path)
    run.do(StepId("rotate"), tmp_path)
    before = run.work.rotations.read_bytes()
    ModelRun(tiny_model(), replace(spinquant, seed=5), tmp_path, device=CPU).do(StepId("rotate"), tmp_path)
    assert run.work.rotations.read_bytes() == before
    assert learning_tokens(spinquant, run.work).shape == (3, 24)


def test_a_model_that_cannot_be_rotated_is_refused_at_once(
    tiny_model: Callable[..., Path], spinquant: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="gemma3_text has norms"):
        ModelRun(tiny_model("gemma3_text"), spinquant, tmp_path, device=CPU)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_finely_rounded_artifact_computes_what_the_source_does(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], calibration: CalibrationConfig, is_tied: bool
) -> None:
    transform = TransformConfig(
        rotation="hadamard", permutation="transpose", fold_gains=True, residual_rotation="hadamard"
    )
    fine = Recipe(
        transform=transform,
        weight=WeightConfig(bits=8),
        activation=ActivationConfig(bits=16),
        kv_cache=KVCacheConfig(bits=16),
        calibration=calibration,
    )
    source = tiny_model("qwen2", tie_word_embeddings=is_tied)
    artifact = tiny_artifact(source, fine).artifact
    model, _ = load(artifact)
    assert model.config.tie_word_embeddings is False
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = TOKENS[:2]
    with torch.no_grad():
        expected, found = original(tokens).logits, model(tokens).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_the_preset_makes_a_model_that_generates_with_one_rotation_online(
    tiny_artifact: Callable[..., Any], spinquant: Recipe
) -> None:
    artifact = tiny_artifact(with_recipe=spinquant).artifact
    assert verify(artifact).ok
    with safe_open(artifact / "model-layer-0000.safetensors", framework="pt") as shard:
        rotations = sorted(name for name in shard.keys() if name.endswith((".R1", ".R2")))  # noqa: SIM118
    assert rotations == ["model.layers.0.mlp.mlp_out.R1", "model.layers.0.mlp.mlp_out.R2"]
    report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    assert report["learning"]["loss_after"] <= report["learning"]["loss_before"]
    assert math.isfinite(report["learning"]["loss_after"])
    model, tokenizer = load(artifact)
    output = model.generate(**tokenizer("Line 3", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert output.shape[1] > 6
