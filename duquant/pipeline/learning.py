"""Learning on one layer's output: weight clips (LWC) and smoothing scales (LET), by AdamW.

The layer runs in float32 with its quantized linears' products in bfloat16, on inputs kept from calibration.
Everything that does not depend on what is learned, transformed weights above all, is computed once.

Reference: OmniQuant, arXiv 2308.13137v3, section 3; DuQuant, arXiv 2406.01721v3, appendix C.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duquant.config import LearningConfig, Recipe
from duquant.errors import CalibrationError
from duquant.models.skeleton import Skeleton
from duquant.pipeline.epochs import LearningReport, keep_best
from duquant.pipeline.folds import Folds, LayerShape
from duquant.pipeline.patching import patched, plain_linear
from duquant.pipeline.prepare import PreparedSite
from duquant.pipeline.rounded import rounded_rows
from duquant.pipeline.site import site_seed
from duquant.quantizers.straight_through import round_between
from duquant.quantizers.weight import ClipRatios, full_range, resolve_group_size

_LOG = logging.getLogger(__name__)
_START = 4.0
"""Logit that every clip starts from: sigmoid(4) = 0.982."""


@dataclass(frozen=True)
class LayerSamples:
    """What a layer is learned on."""

    skeleton: Skeleton
    inputs: Float[Tensor, "samples seq hidden"]
    """What the layer is calibrated on, in the compute dtype."""


@dataclass(frozen=True)
class Learned:
    """What was learned."""

    clips: dict[str, ClipRatios]
    """By linear."""
    smooth: dict[str, Float[Tensor, " channels"]]
    """By site: what its inputs are to be divided by, on top of what is folded."""
    report: LearningReport


class _LearnedSite:
    """A site's online part while learning: its linears share one rounded tensor."""

    def __init__(self, prepared: PreparedSite, recipe: Recipe, shape: LayerShape) -> None:
        self._prepared = prepared
        self._config = recipe.activation
        self._heads = (shape.kv_heads, shape.head_dim)
        self._is_by_kv_head = prepared.site.fold.kind == "kv_rows"
        self.log_smooth: nn.Parameter | None = None
        if recipe.transform.smooth_learned and prepared.site.name != "mlp_out":
            channels = math.prod(self._heads) if self._is_by_kv_head else prepared.transformed.shape[1]
            self.log_smooth = nn.Parameter(
                torch.zeros(channels, device=prepared.transformed.device, dtype=torch.float32)
            )
        self._seen: tuple[Tensor, Tensor] | None = None

    def smooth(self) -> Float[Tensor, " channels"] | None:
        """Return what inputs are divided by and weights multiplied by."""
        if self.log_smooth is None:
            return None
        scale = self.log_smooth.exp()
        if not self._is_by_kv_head:
            return scale
        channels = self._prepared.transformed.shape[1]
        kv_heads, head_dim = self._heads
        # All query heads of a KV head take its scales, or they could not be folded.
        return scale.view(kv_heads, 1, head_dim).expand(-1, channels // (kv_heads * head_dim), -1).reshape(-1)

    def rounded(self, X: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "tokens channels"]:
        """Return transformed and rounded rows, bfloat16; rounding passes gradients as they are."""
        if self._seen is None or self._seen[0] is not X:
            rows = X.reshape(-1, X.shape[-1]).float()
            scale = self.smooth()
            rows = self._prepared.transform.apply(rows if scale is None else rows / scale)
            self._seen = X, rounded_rows(rows, self._config, self._prepared.clip_ratio).bfloat16()
        return self._seen[1]

    def forget(self) -> None:
        """Let go of the last input: its graph is used up."""
        self._seen = None


class _LearnedLinear:
    """A linear whose weight is rounded between ends that are learned."""

    def __init__(self, linear: str, site: _LearnedSite, prepared: PreparedSite, recipe: Recipe) -> None:
        blocks = list(prepared.weights.blocks(linear, 1 << 20))
        group_size = resolve_group_size(blocks[0].shape[1], recipe.weight.group_size)
        W = torch.cat(blocks)
        self._W = W.view(W.shape[0], -1, group_size)  # (out_features, groups, group_size)
        self._low, self._high = full_range(self._W)
        self._bits = recipe.weight.bits
        self._site = site
        self.bias: Tensor | None = None
        self.beta_logit = nn.Parameter(torch.full_like(self._low, _START))
        self.gamma_logit = nn.Parameter(torch.full_like(self._low, _START))
        self._constant: Tensor | None = None

    def forward(self, X: Float[Tensor, "batch seq in_features"]) -> Float[Tensor, "batch seq out_features"]:
        """Return what the packed linear would, in float32."""
        rows = self._site.rounded(X)
        W = self._weight().bfloat16() if self._constant is None else self._constant
        Y = nn.functional.linear(rows, W).float()
        return (Y if self.bias is None else Y + self.bias).view(*X.shape[:-1], -1)

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Round the weight once for all forward passes inside the `with` block: nothing is learned there."""
        self._constant = self._weight().bfloat16()
        try:
            yield
        finally:
            self._constant = None

    def _weight(self) -> Float[Tensor, "out_features in_features"]:
        W, low, high = self._W, self._low, self._high
        scale = self._site.smooth()
        if scale is not None:
            W = W * scale.view(W.shape[1:])
            low, high = full_range(W)
        rounded = round_between(W, low * self.beta_logit.sigmoid(), high * self.gamma_logit.sigmoid(), bits=self._bits)
        return rounded.view(W.shape[0], -1)

    def ratios(self) -> ClipRatios:
        """Return what the row's range is multiplied by now."""
        return ClipRatios(self.beta_logit.detach().sigmoid(), self.gamma_logit.detach().sigmoid())


class _Learner:
    """One layer with what is learned of it."""

    def __init__(
        self, prepared: Sequence[PreparedSite], recipe: Recipe, shape: LayerShape, samples: LayerSamples
    ) -> None:
        self._sites = {each.site.name: _LearnedSite(each, recipe, shape) for each in prepared}
        self.linears = {
            linear: _LearnedLinear(linear, self._sites[each.site.name], each, recipe)
            for each in prepared
            for linear in each.site.linears
        }
        self._samples = samples
        clips = [p for each in self.linears.values() for p in (each.beta_logit, each.gamma_logit)]
        scales = [site.log_smooth for site in self._sites.values() if site.log_smooth is not None]
        self._parameters: list[nn.Parameter] = clips + scales
        config = recipe.learning
        self._optimizer = torch.optim.AdamW(
            [{"params": clips, "lr": config.clip_rate}, {"params": scales, "lr": config.smooth_rate}], weight_decay=0.0
        )

    @contextmanager
    def patched(self, layer: nn.Module) -> Iterator[None]:
        """Let the layer's quantized linears run as learned ones."""
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for name, learned in self.linears.items():
            module = plain_linear(layer, name)
            learned.bias = None if module.bias is None else module.bias.detach()
            forwards[module] = learned.forward
        with patched(forwards):
            yield

    def loss(self, layer: nn.Module, sample: int, target: Tensor) -> Tensor:
        """Return the mean squared distance of one sample's output from its target."""
        output = self._samples.skeleton.forward(layer, self._samples.inputs[sample : sample + 1].float())
        for site in self._sites.values():
            site.forget()
        return (output - target).square().mean()

    def step(self, loss: Tensor) -> None:
        """Move everything that is learned by one gradient."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self._optimizer.step()
        self._optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        """Return a copy of everything that is learned."""
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Take back what `values` returned."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def smooth(self) -> dict[str, Tensor]:
        """Return the learned scales by site."""
        with torch.no_grad():
            found = {name: site.smooth() for name, site in self._sites.items()}
        return {name: scale for name, scale in found.items() if scale is not None}


def learn(
    prepared: Sequence[PreparedSite],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    folds: Folds,
    shape: LayerShape,
    samples: LayerSamples,
    recipe: Recipe,
    *,
    layer: int,
) -> Learned:
    """Learn the clips, and where the recipe says so the smoothing scales, of one layer.

    The result is never worse than the start on these samples: the best epoch's values are kept.

    Args:
        prepared: the quantized sites.
        tensors: the layer's parameters as they are stored.
        state: the same with smoothing folded into the norms.
        folds: what else smoothing does.
        shape: head counts, for scales that grouped query heads share.
        samples: inputs.
        recipe: what to learn, and how long.
        layer: the layer's index, for the seed and for messages.

    Raises:
        CalibrationError: the loss is NaN or Inf before anything was learned.
        UnsupportedModelError: what the recipe quantizes is no plain linear.
    """
    skeleton, inputs = samples.skeleton, samples.inputs
    with torch.no_grad(), skeleton.layer(layer, tensors, dtype=torch.float32) as module:
        targets = [skeleton.forward(module, inputs[i : i + 1].float()) for i in range(len(inputs))]
    learner = _Learner(prepared, recipe, shape, samples)
    smoothed = {name: folds.tensor(name, t) if t.dim() == 1 else t for name, t in state.items()}
    with skeleton.layer(layer, smoothed, dtype=torch.float32) as module, learner.patched(module):
        module.requires_grad_(False)
        order = torch.Generator().manual_seed(site_seed(recipe.seed, layer, "learning"))
        report = _run(learner, module, targets, recipe.learning, order)
    if not math.isfinite(report.loss_before):
        raise CalibrationError(
            f"layer {layer}: the loss is {report.loss_before} before anything is learned", layer=layer
        )
    if report.is_restored:
        _LOG.warning("layer %d: a loss was NaN or Inf while learning; the best values before it are kept", layer)
    clips = {name: linear.ratios() for name, linear in learner.linears.items()}
    return Learned(clips, learner.smooth(), report)


def _run(
    learner: _Learner, module: nn.Module, targets: Sequence[Tensor], config: LearningConfig, order: torch.Generator
) -> LearningReport:
    """Go through the samples until the budget is spent, the loss stays, or it is not finite; leave the best values."""

    @torch.no_grad()
    def total() -> float:
        with ExitStack() as stack:
            for linear in learner.linears.values():
                stack.enter_context(linear.unchanging())
            return sum(learner.loss(module, i, target).item() for i, target in enumerate(targets)) / len(targets)

    def epoch() -> float:
        for i in torch.randperm(len(targets), generator=order).tolist():
            with torch.enable_grad():
                loss = learner.loss(module, i, targets[i])
                if not math.isfinite(loss.item()):
                    return math.nan
                learner.step(loss)
        return total()

    return keep_best(learner, total, epoch, config)
