"""Distillation: layers that learned together give more of the unquantized network's distribution, and run as told."""

import errno
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duquant.artifact import verify
from duquant.calibration.sweep import read_tokens
from duquant.config import ActivationConfig, DistillationConfig, KVCacheConfig, Recipe, WeightConfig
from duquant.errors import CalibrationError, ScratchError
from duquant.inference import load
from duquant.inference.cache import DuQuantCacheLayer
from duquant.inference.hf import new_cache
from duquant.inference.layers import packed_layer
from duquant.models.skeleton import NetworkEnds, Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import read_tensors
from duquant.pipeline import ModelRun, StepId, quantize_model
from duquant.pipeline.distillation import Distiller, Sequences, cut, distill, last_hidden_states, split
from duquant.pipeline.rounded import RoundedStates
from duquant.pipeline.student import StudentLayer
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer

CPU = torch.device("cpu")
BUDGET = DistillationConfig(steps=12, batch=4, seq_len=16, rate=0.01)
TOKENS = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def distilled(recipe: Recipe) -> Recipe:
    """A recipe with a small budget."""
    return replace(recipe, name="distilled", distillation=BUDGET)


class Case:
    """The drafts of a tiny model."""

    def __init__(self, model: Path, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.run = recipe, ModelRun(model, recipe, folder, device=CPU)
        for step in self.run.steps():
            if step.id.kind == "distill":
                break
            self.run.do(step.id, folder)
        self.source = SourceCheckpoint(model)
        self.skeleton = Skeleton(self.source, CPU)
        self.ends = NetworkEnds(self.source, self.skeleton)
        read = [read_tensors(self.run.work.packed(layer), "a draft")[0] for layer in range(self.source.layers)]
        self.drafts = [
            {name.split(".", 3)[3]: tensor for name, tensor in tensors.items()} for tensors in read
        ]  # model.layers.N.

    def students(self) -> list[StudentLayer]:
        sites = [self.source.architecture.kept_sites((), layer) for layer in range(len(self.drafts))]
        return [
            StudentLayer(tensors, sites[layer], self.recipe, self.skeleton, layer)
            for layer, tensors in enumerate(self.drafts)
        ]

    def distiller(self) -> Distiller:
        return Distiller(self.students(), self.ends, self.recipe.distillation)

    def sequences(self, tokens: Tensor = TOKENS) -> Sequences:
        return Sequences(tokens, last_hidden_states(self.source, self.skeleton, self.ends, tokens, 2))

    def distill(self) -> Any:
        calibration = self.recipe.calibration
        windows = read_tokens(self.run.work, range(calibration.samples), calibration.seq_len)
        return distill(self.source, self.skeleton, self.recipe, self.drafts, windows)


@pytest.fixture
def make_case(tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path) -> Callable[..., Case]:
    """Factory of cases: make_case("qwen2", recipe)."""
    return lambda model_type="llama", recipe=None: Case(tiny_model(model_type), recipe or distilled, tmp_path / "work")


@torch.no_grad()
def assert_runs_as_its_shard(case: Case) -> None:
    """Compare a student with the layer that a loaded artifact has: the linears, and all of it where little is rounded.

    Where activations have 4 bits, one code that differs makes others differ behind it.
    """
    X = case.ends.embed(TOKENS)
    for layer, student in enumerate(case.students()):
        sites = case.source.architecture.kept_sites((), layer)
        module = packed_layer(case.skeleton.empty_layer(layer), sites, case.recipe, case.drafts[layer])
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name in student._linears:
            module.get_submodule(name).register_forward_hook(
                lambda _module, given, output, name=name, seen=seen: seen.update({name: (given[0], output)})
            )
        config = case.recipe.kv_cache
        cache = new_cache(case.skeleton.config, config, [module]) if config.bits < 16 else None
        expected = case.skeleton.forward(module, X, cache=cache)
        for name, (given, output) in seen.items():
            found = student._linears[name].forward(given)
            # In bfloat16 the rotations of 4-bit rows move a few codes by a step.
            assert float((found - output).norm() / output.norm()) < (0.05 if case.recipe.activation.bits == 4 else 0.01)
        with student.running() as run:
            found = run(X)
        if case.recipe.activation.bits == 16:
            assert float((found - expected).norm() / (expected - X).norm()) < 0.03
        X = expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_student_runs_as_its_shard(
    make_case: Callable[..., Case], distilled: Recipe, model_type: str, bits: int
) -> None:
    kv_cache = distilled.kv_cache if bits == 4 else replace(distilled.kv_cache, bits=8)
    clip_ratio = 1.0 if bits == 16 else 0.8
    activation = ActivationConfig(bits=bits, clip_ratio=clip_ratio)
    chosen = replace(distilled, activation=activation, kv_cache=kv_cache)
    assert_runs_as_its_shard(make_case(model_type, chosen))


@pytest.mark.parametrize("smooth_keys", [False, True])
def test_keys_and_values_are_what_the_cache_gives_back(smooth_keys: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 20, 16, generator=generator) for _ in range(2))
    config = KVCacheConfig(bits=4, rotate=True, smooth_keys=smooth_keys, sink_tokens=2)
    smoothing = None
    if smooth_keys:
        smoothing = KeySmoothing(torch.randn(3, 16, generator=generator), torch.rand(3, 16, generator=generator) + 0.1)
    cache = DuQuantCacheLayer(KVQuantizer(config, 16), smoothing=smoothing)
    states = RoundedStates(KVQuantizer(config, 16), smoothing=smoothing)
    keys.requires_grad_()
    values.requires_grad_()
    found = states.update(keys, values, 0)
    for rounded, expected in zip(found, cache.update(keys.detach(), values.detach()), strict=True):
        torch.testing.assert_close(rounded, expected, atol=1e-5, rtol=1e-5)
    (found[0].sum() + found[1].sum()).backward()
    for given in (keys, values):
        assert given.grad is not None
        assert bool((given.grad == 1).all())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_what_was_learned_is_what_the_artifact_computes(
    tiny_model: Callable[..., Path],
    tiny_artifact: Callable[..., Any],
    distilled: Recipe,
    model_type: str,
) -> None:
    source = tiny_model(model_type)
    artifact = tiny_artifact(source, distilled).artifact
    assert verify(artifact).ok
    report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))["distillation"]
    assert report["steps"] == BUDGET.steps
    assert not report["is_restored"]
    assert report["loss_after"] < report["loss_before"]
    model, tokenizer = load(artifact)
    output = model.generate(**tokenizer("Line 3", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert output.shape[1] > 6


def test_gradients_are_those_of_the_whole_graph(make_case: Callable[..., Case]) -> None:
    case = make_case()
    sequences = case.sequences()
    students = case.students()
    for student in students:
        student.step = lambda _rate: None  # type: ignore[method-assign]  # the gradients stay
    loss = Distiller(students, case.ends, case.recipe.distillation)._step(sequences, 1.0)

    whole = case.students()
    X = case.ends.embed(sequences.tokens)
    for student in whole:
        with student.running() as run:
            X = run(X)
    student_logits, teacher_logits = (case.ends.logits(each).float().log_softmax(-1) for each in (X, sequences.hidden))
    expected = nn.functional.kl_div(student_logits, teacher_logits, reduction="sum", log_target=True) / TOKENS.numel()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3)
    for layer, of_whole in zip(students, whole, strict=True):
        for found, wanted in zip(layer.parameters(), of_whole.parameters(), strict=True):
            assert wanted.grad is not None
            assert float(wanted.grad.norm()) > 0
            assert found.grad is not None
            assert float((found.grad - wanted.grad).norm() / wanted.grad.norm()) < 0.05


def test_only_scales_and_gains_change(make_case: Callable[..., Case]) -> None:
    case = make_case()
    learned, report = case.distill()
    assert not report.is_restored
    changed = {
        name
        for before, after in zip(case.drafts, learned, strict=True)
        for name in before
        if not torch.equal(before[name], after[name])
    }
    linears = case.source.architecture.linears_of(0)
    norms = ("input_layernorm", "post_attention_layernorm")
    assert changed == {*(f"{name}.weight_scale" for name in linears), *(f"{name}.weight" for name in norms)}
    assert all(after.keys() == before.keys() for before, after in zip(case.drafts, learned, strict=True))


def test_what_learning_made_worse_stays_as_it_was(
    make_case: Callable[..., Case],
    distilled: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wild = replace(distilled, distillation=replace(BUDGET, rate=1.0))
    case = make_case(recipe=wild)
    measured: list[float] = []
    plain = Distiller.loss
    monkeypatch.setattr(Distiller, "loss", lambda *given: measured.append(plain(*given)) or measured[-1])
    learned, report = case.distill()
    assert report.is_restored
    assert [report.loss_before, report.loss_after] == measured
    assert report.loss_after > report.loss_before
    assert "the layers stay what they were" in caplog.text
    for before, after in zip(case.drafts, learned, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_no_number_ends_learning(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case()
    losses = iter([0.5, 0.4])
    plain = Distiller._divergence

    def divergence(self: Distiller, hidden: Tensor, target: Tensor) -> tuple[float, Tensor]:
        loss, gradient = plain(self, hidden, target)
        if torch.is_grad_enabled() and next(losses, None) is None:
            return math.nan, torch.full_like(gradient, math.nan)
        return loss, gradient

    monkeypatch.setattr(Distiller, "_divergence", divergence)
    learned, report = case.distill()
    assert report.is_restored
    assert report.steps == 2
    assert report.loss_after is None
    assert "in step 3" in caplog.text
    assert torch.equal(learned[0]["mlp.down_proj.weight_packed"], case.drafts[0]["mlp.down_proj.weight_packed"])


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_loss_that_is_no_number_after_learning_is_none_in_the_report(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    case = make_case()
    losses = iter([0.5, after])
    monkeypatch.setattr(Distiller, "loss", lambda *_given: next(losses))
    learned, report = case.distill()
    assert asdict(report) == {"loss_before": 0.5, "loss_after": None, "steps": BUDGET.steps, "is_restored": True}
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["loss_after"] is None
    assert torch.equal(learned[0]["mlp.down_proj.weight_scale"], case.drafts[0]["mlp.down_proj.weight_scale"])


def test_a_divergence_that_is_no_number_before_learning_is_an_error(make_case: Callable[..., Case]) -> None:
    case = make_case()
    case.drafts[1]["mlp.down_proj.weight_scale"].fill_(math.nan)
    with pytest.raises(CalibrationError, match="divergence is nan before anything is learned"):
        case.distill()


def test_too_little_text_is_named(make_case: Callable[..., Case]) -> None:
    case = make_case()
    with pytest.raises(CalibrationError, match=r"two pieces of distillation\.seq_len 16 tokens"):
        distill(case.source, case.skeleton, case.recipe, case.drafts, TOKENS[:1])


def test_pieces_begin_with_bos_where_the_model_needs_it() -> None:
    windows = torch.arange(14).view(2, 7)
    assert cut(windows, 3, starts_with_bos=False).tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert cut(windows, 3, starts_with_bos=True)[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [2, 15, 16, 17, 256, 5000])
def test_some_sequences_are_held_out(count: int) -> None:
    learned, held = split(count)
    assert sorted(learned + held) == list(range(count))
    assert 1 <= len(held) <= 16
    assert len(held) <= max(1, -(-count // 16))


@pytest.mark.parametrize("mode", [{}, {"input_mode": "quantized"}, {"refine_passes": 1}])
def test_the_same_bytes_whatever_was_interrupted(
    tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path, mode: dict[str, Any]
) -> None:
    recipe = replace(distilled, **mode)
    quantize_model(str(tiny_model()), tmp_path / "whole", recipe, device="cpu")
    out = tmp_path / "steps"
    out.mkdir()
    finished: set[int] = set()
    done = []
    # A process that does one step each time.
    while True:
        run = ModelRun(tiny_model(), recipe, tmp_path / "work", device=CPU)
        left = run.steps(frozenset(finished))
        if not left:
            break
        step = next(each.id for each in left if each.id not in done or (each.id.kind == "tokenize" and len(left) < 2))
        if step.kind in ("quantize", "extra"):
            finished.add(step.layer)
        run.do(step, out)
        done.append(step)
    assert done.count(StepId("distill")) == 1
    for shard in sorted((tmp_path / "whole").glob("model-*.safetensors")):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


def test_a_broken_result_is_deleted_whole(tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path) -> None:
    run = ModelRun(tiny_model(), distilled, tmp_path / "work", device=CPU)
    steps = [step.id for step in run.steps()]
    for step in steps[: steps.index(StepId("quantize", 0))]:
        run.do(step, tmp_path)
    assert run.lost is None
    assert not [*run.work.root.glob("packed-*"), *run.work.root.glob("statistics-*")]
    assert [step.id.kind for step in run.steps(frozenset({-1}))] == ["quantize", "quantize"]
    (run.work.distilled / "model-layer-0001.safetensors").write_bytes(b"cut")
    with pytest.raises(ScratchError, match="cannot read the distilled layer"):
        run.quantize(1, tmp_path)
    assert not run.work.distilled.exists()
    assert run.lost == "the other layers that it learned with are gone"
    assert StepId("distill") in [step.id for step in run.steps()]


def distilled_run(model: Path, recipe: Recipe, folder: Path) -> ModelRun:
    """Do all steps of a run up to the first shard."""
    run = ModelRun(model, recipe, folder / "work", device=CPU)
    for step in run.steps():
        if step.id.kind in ("extra", "quantize"):
            break
        run.do(step.id, folder)
    return run


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_result_without_its_report_is_deleted_whole(
    tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path, content: str | None
) -> None:
    run = distilled_run(tiny_model(), distilled, tmp_path)
    report = run.work.distilled / "report.json"
    report.unlink()
    if content is not None:
        report.write_text(content, encoding="utf-8")
    with pytest.raises(ScratchError, match="cannot read the report of distillation"):
        run.embeddings(tmp_path)
    assert run.lost is not None
    assert StepId("distill") in [step.id for step in run.steps()]


def test_a_disk_that_does_not_answer_costs_no_result(
    tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distilled_run(tiny_model(), distilled, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("duquant.models.tensor_files.safe_open", fail)
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(ScratchError, match="Input/output error"):
            run._distilled(0)
        with pytest.raises(ScratchError, match="Input/output error"):
            run._distillation_report()
    assert run.lost is None
    run.quantize(0, tmp_path)
    run.embeddings(tmp_path)


def test_hidden_states_are_there_once(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    plain = Distiller.learn

    def learn(self: Distiller, learned: Sequences, held_out: Sequences, generator: torch.Generator) -> Any:
        places.extend(part.hidden.untyped_storage().data_ptr() for part in (learned, held_out))
        return plain(self, learned, held_out, generator)

    monkeypatch.setattr(Distiller, "learn", learn)
    make_case().distill()
    assert places[0] == places[1]


def test_a_chain_runs_drafts_and_no_shards(tiny_model: Callable[..., Path], distilled: Recipe, tmp_path: Path) -> None:
    run = ModelRun(tiny_model(), replace(distilled, input_mode="quantized"), tmp_path / "work", device=CPU)
    step = next(each.id for each in run.steps() if each.id.kind == "propagate")
    assert not run.runs_shard(step)
    with pytest.raises(ScratchError, match="cannot read the quantized layer"):
        run.do(step, tmp_path)


def test_weights_alone_in_groups_are_learned_too(make_case: Callable[..., Case], distilled: Recipe) -> None:
    weights = replace(
        distilled,
        weight=WeightConfig(bits=4, group_size=16),
        activation=ActivationConfig(bits=16),
        kv_cache=KVCacheConfig(bits=16),
        distillation=replace(BUDGET, rate=0.002),
    )
    _, report = make_case(recipe=weights).distill()
    assert report.loss_after < report.loss_before
