"""The rotations of the residual stream and of the values: random-sign Hadamard matrices, or learned from there.

They are learned on the whole network: cross-entropy of the next token with activations and KV cache rounded and weights
in 16 bits, which GPTQ rounds afterwards. Nothing of the weights changes while learning: instead of folding R into them,
a site's inputs X are replaced by Q(X R) R^T, which gives the same outputs. Layers get their tensors one at a time,
forwards and then backwards, each layer's forward pass done again for its gradients; so a device holds one layer, and
the host the model in 16 bits.

Reference: SpinQuant, arXiv 2405.16406v4, section 3.2, with the weights in 16 bits as its section 4.3 advises for GPTQ.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from duquant.calibration.sweep import WorkDir, learning_windows, read_tokens, shard_windows
from duquant.config import ActivationConfig, Recipe
from duquant.errors import CalibrationError
from duquant.models.architecture import Site
from duquant.models.rotated import ResidualRotations, rotate_layer
from duquant.models.skeleton import COMPUTE_DTYPE, NetworkEnds, Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.epochs import LearningReport, keep_best
from duquant.pipeline.patching import patched, plain_linear
from duquant.pipeline.rounded import RoundedStates, rounded_rows
from duquant.pipeline.site import site_seed
from duquant.pipeline.steps import Step, StepId
from duquant.quantizers.kv import KVQuantizer
from duquant.transforms.cayley import cayley_step
from duquant.transforms.rotation import apply_rotation, hadamard_rotation, kronecker_sides
from duquant.transforms.site import SiteTransform, search_transform

_LOG = logging.getLogger(__name__)


def start_rotations(recipe: Recipe, *, hidden: int, layers: int, head_dim: int) -> ResidualRotations:
    """Return random-sign Hadamard rotations, float64.

    Values meet R2 before o_proj and, where the cache rotates, R2 H in the cache with a Hadamard matrix H. Were R2 one,
    too, R2 H would be no rotation at all; it is then the product of two with signs of their own.
    """
    generator = torch.Generator().manual_seed(site_seed(recipe.seed, -1, "residual"))
    sides = kronecker_sides(hidden)
    R1 = torch.kron(*(hadamard_rotation(n, None, generator) for n in sides))
    R2 = hadamard_rotation(head_dim, layers, generator)
    if recipe.kv_cache.rotate and recipe.kv_cache.bits < 16:
        R2 = R2 @ hadamard_rotation(head_dim, layers, generator)
    return ResidualRotations(R1, R2)


def write_rotations(source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, work: WorkDir) -> None:
    """Write the rotations of a run, with a report when they are learned, unless they are there.

    Raises:
        CalibrationError: the loss is NaN or Inf before anything is learned.
        SourceError: the model's tensors are unusable.
    """
    if work.rotations.exists():
        return
    rotations = start_rotations(
        recipe, hidden=int(source.config["hidden_size"]), layers=source.layers, head_dim=skeleton.head_dim
    )
    metadata = {}
    if recipe.transform.residual_rotation == "learned":
        rotations, report = learn_rotations(source, skeleton, recipe, rotations, learning_tokens(recipe, work))
        metadata["learning"] = json.dumps({name: float(value) for name, value in asdict(report).items()})
    rotations.save(work.rotations, metadata)


def learning_tokens(recipe: Recipe, work: WorkDir) -> Int64[Tensor, "samples seq"]:
    """Return the tokens to learn on: the first learning.seq_len of learning.samples evenly spread windows."""
    parts = []
    for shard, windows in enumerate(shard_windows(recipe.calibration)):
        tokens = read_tokens(work, windows, recipe.calibration.seq_len)
        parts.append(tokens[learning_windows(recipe, shard), : recipe.learning.seq_len])
    return torch.cat(parts)


def learn_rotations(
    source: SourceCheckpoint,
    skeleton: Skeleton,
    recipe: Recipe,
    start: ResidualRotations,
    tokens: Int64[Tensor, "samples seq"],
) -> tuple[ResidualRotations, LearningReport]:
    """Return the rotations of least loss on these samples that Cayley SGD came by, the start among them.

    Raises:
        CalibrationError: the loss is NaN or Inf before anything is learned.
        SourceError: the model's tensors are unusable.
    """
    learner = _Learner(source, skeleton, recipe, start)
    order = torch.Generator().manual_seed(site_seed(recipe.seed, -1, "learning"))
    config = recipe.learning
    steps, done = config.epochs * len(tokens), 0

    def total() -> float:
        return sum(learner.loss(sample) for sample in tokens) / len(tokens)

    def epoch() -> float:
        nonlocal done
        for index in torch.randperm(len(tokens), generator=order).tolist():
            loss = learner.differentiate(tokens[index])
            if not math.isfinite(loss):
                return math.nan
            learner.step(config.rotation_rate * (1 - done / steps))
            done += 1
        return total()

    report = keep_best(learner, total, epoch, config)
    if not math.isfinite(report.loss_before):
        raise CalibrationError(f"the network's loss is {report.loss_before} before any rotation is learned")
    if report.is_restored:
        _LOG.warning("a loss was NaN or Inf while rotations were learned; the best rotations before it are kept")
    return learner.rotations, report


class _RoundedSite:
    """Rounds what enters the linears of one site, in one forward pass of its layer."""

    def __init__(self, R: Tensor | None, transform: SiteTransform, config: ActivationConfig) -> None:
        self._R, self._transform, self._config = R, transform, config
        self._seen: tuple[Tensor, Tensor] | None = None

    def product(
        self, linear: nn.Linear, X: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return what the linear makes of rounded inputs; rounding passes gradients as they are."""
        if self._seen is None or self._seen[0] is not X:
            self._seen = X, self._rounded(X)
        return nn.functional.linear(self._seen[1], linear.weight, linear.bias)

    def _rounded(self, X: Tensor) -> Tensor:
        rows = self._transform.apply(X.reshape(-1, X.shape[-1]))
        if self._R is not None:
            rows = apply_rotation(rows, self._R)
        clip_ratio = torch.full((2,), self._config.clip_ratio, device=X.device, dtype=torch.float32)
        rows = rounded_rows(rows, self._config, clip_ratio)
        if self._R is not None:
            rows = apply_rotation(rows, self._R.T)
        return rows.view(X.shape)


class _Learner:
    """The network with its rotations."""

    def __init__(self, source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, start: ResidualRotations) -> None:
        self._skeleton, self._recipe = skeleton, recipe
        self._architecture = source.architecture
        self._device = skeleton.device
        is_rounded = recipe.kv_cache.bits < 16
        self._quantizer = KVQuantizer(recipe.kv_cache, skeleton.head_dim) if is_rounded else None
        self._online: dict[int, SiteTransform] = {}
        self._tensors = [self._layer_tensors(source, layer) for layer in range(source.layers)]
        self._ends = NetworkEnds(source, skeleton)
        self.rotations = start
        self._take(start)

    def _layer_tensors(self, source: SourceCheckpoint, layer: int) -> dict[str, Tensor]:
        """Return a layer's tensors on the CPU, with gains folded and the rotation of mlp_out, which is not learned."""
        state = rotate_layer(self._skeleton.load(source, layer), self._architecture, layer)
        for site in self._architecture.kept_sites(self._recipe.skip_linears, layer):
            if site.name == "mlp_out":
                generator = torch.Generator().manual_seed(site_seed(self._recipe.seed, layer, site.name))
                width = state[f"{site.linears[0]}.weight"].shape[1]
                transform = search_transform(
                    torch.zeros(1, width, device=self._device), self._recipe.transform, generator
                )
                self._online[layer] = transform
                for linear in site.linears:
                    W = state[f"{linear}.weight"].to(self._device, torch.float32)
                    state[f"{linear}.weight"] = transform.apply(W).cpu()
        return {name: tensor.to(COMPUTE_DTYPE) for name, tensor in state.items()}

    def _take(self, rotations: ResidualRotations) -> None:
        self.rotations = rotations
        # Gradients of many layers are added up in these, so they are float32.
        self._R1 = rotations.R1.to(self._device, torch.float32).requires_grad_()
        self._R2 = rotations.R2.to(self._device, torch.float32).requires_grad_()

    def values(self) -> list[Tensor]:
        """Return the rotations; they are replaced, never changed."""
        return [self.rotations.R1, self.rotations.R2]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Take back what `values` returned."""
        self._take(ResidualRotations(*values))

    @torch.no_grad()
    def loss(self, tokens: Int64[Tensor, " seq"]) -> float:
        """Return the mean cross-entropy of the tokens after the first."""
        return float(self._cross_entropy(self._forward(tokens)[-1], tokens))

    def differentiate(self, tokens: Int64[Tensor, " seq"]) -> float:
        """Return the loss, and add its gradients to those of the rotations."""
        with torch.no_grad():
            inputs = self._forward(tokens)
        with torch.enable_grad():
            X = inputs.pop().requires_grad_()
            loss = self._cross_entropy(X, tokens)
            (gradient,) = torch.autograd.grad(loss, X)
            while inputs:
                X = inputs.pop().requires_grad_()
                with self._layer(len(inputs)) as run:
                    run(X).backward(gradient)  # type: ignore[no-untyped-call]  # torch's
                assert X.grad is not None
                gradient = X.grad
        return float(loss.detach())

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the rotations against their gradients, and forget these."""

        def moved(R: Tensor, leaf: Tensor) -> Tensor:
            if leaf.grad is None:  # all that it rotates keeps 16 bits
                return R
            return cayley_step(R.to(self._device), leaf.grad.double(), rate).to(R.device)

        self._take(ResidualRotations(moved(self.rotations.R1, self._R1), moved(self.rotations.R2, self._R2)))

    def _forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the inputs of every layer, and the last one's outputs."""
        states = [self._ends.embed(tokens[None])]
        for layer in range(len(self._tensors)):
            with self._layer(layer) as run:
                states.append(run(states[-1]))
        return states

    def _cross_entropy(self, X: Tensor, tokens: Tensor) -> Tensor:
        logits = self._ends.logits(X)[0, :-1]
        return nn.functional.cross_entropy(logits.float(), tokens[1:].to(self._device))

    @contextmanager
    def _layer(self, layer: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend a layer its tensors, its quantized linears patched; yield what runs it."""
        R1, R2 = self._R1.to(COMPUTE_DTYPE), self._R2[layer].to(COMPUTE_DTYPE)
        cache = RoundedStates(self._quantizer, R2=R2)
        with self._skeleton.layer(layer, self._tensors[layer]) as module:
            module.requires_grad_(False)
            forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
            for site in self._architecture.kept_sites(self._recipe.skip_linears, layer):
                rounded = self._site(site, layer, R1, R2)
                for name in site.linears:
                    linear = plain_linear(module, name)
                    forwards[linear] = partial(rounded.product, linear)
            with patched(forwards):
                yield lambda X: self._skeleton.forward(module, X, cache=cache)

    def _site(self, site: Site, layer: int, R1: Tensor, R2: Tensor) -> _RoundedSite:
        if site.name == "mlp_out":
            return _RoundedSite(None, self._online[layer], self._recipe.activation)
        return _RoundedSite(R2 if site.name == "attn_out" else R1, SiteTransform(), self._recipe.activation)


def rotate_first(steps: Sequence[Step]) -> list[Step]:
    """Return a plan's steps with one before them that makes the rotations; it is done at once where they are there."""
    if not steps:
        return []
    tokenize, rotate = Step(StepId("tokenize")), Step(StepId("rotate"), (StepId("tokenize"),))
    rest = [Step(step.id, (*step.needs, rotate.id)) for step in steps if step.id != tokenize.id]
    return [tokenize, rotate, *rest]
