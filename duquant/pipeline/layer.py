"""quantize_layer: one decoder layer in, the tensors of its packed shard out."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.artifact.layout import smallest_index_type
from duquant.calibration.statistics import SiteStatistics
from duquant.config import Recipe
from duquant.errors import CalibrationError
from duquant.models.architecture import Architecture, Site
from duquant.quantizers.affine import fake_quantize, row_grid
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import QuantizedWeight, quantize_weight
from duquant.transforms.site import SiteTransform, search_transform
from duquant.transforms.smoothing import exact_fold, share_over_heads, smoothing_scale

_ERROR_ROW_STRIDE = 4
_BLOCK_ELEMENTS = 1 << 18
"""Weights are worked on a few rows at a time, so that float32 copies of a big one never exist as a whole."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that its tensors do not tell."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class SiteReport:
    """How one site fared on the sampled rows."""

    peak_before: float
    """max|X| after smoothing, before the transform."""
    peak_after: float
    """max|T(X)|."""
    output_nmse: float
    """Squared error of the quantized linears' outputs over their power, all linears of the site together."""


@dataclass(frozen=True)
class QuantizedLayer:
    """The shard's tensors, by their names inside the layer, and a report by site."""

    tensors: dict[str, Tensor]
    report: dict[str, SiteReport] = field(default_factory=dict)
    quantized_weights: int = 0
    """Number of weights that are packed now."""


def site_seed(seed: int, layer: int, site: str) -> int:
    """Return the seed of one site of one layer: the same on any worker, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/{site}".encode()).digest()[:6], "big")


@torch.no_grad()
def quantize_layer(
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    architecture: Architecture,
    shape: LayerShape,
    recipe: Recipe,
    *,
    layer: int,
) -> QuantizedLayer:
    """Smooth, transform, round and pack one layer: a pure function of its arguments.

    Args:
        tensors: the layer's parameters by their names inside it, in their stored dtype.
        statistics: by site name, from the unquantized model.
        architecture: where sites and folds are.
        shape: head counts, for smoothing under grouped-query attention.
        recipe: what to do.
        layer: the layer's index; with recipe.seed it decides every random choice.

    Raises:
        CalibrationError: a smoothing scale or a packed value is not finite.
    """
    sites = architecture.kept_sites(recipe.skip_linears)
    state = dict(tensors)
    folds = _smoothing(state, statistics, sites, shape, recipe)
    output: dict[str, Tensor] = {}
    report: dict[str, SiteReport] = {}
    count = 0
    for site in sites:
        rows = statistics[site.name].rows.float().div_(folds.columns[site.name])
        peak_before = _peak(rows)
        generator = torch.Generator().manual_seed(site_seed(recipe.seed, layer, site.name))
        transform = search_transform(rows, recipe.transform, generator)
        transformed = transform.apply(rows)
        del rows
        importance = torch.linalg.vector_norm(transformed, dim=0).square_()  # up to a factor, without a copy
        error = _SiteError(transformed, recipe)
        for linear in site.linears:
            parts = []
            stored = state.pop(f"{linear}.weight")
            for block in _row_blocks(stored):
                W = transform.apply(folds.weight(linear, stored[block], block).mul_(folds.columns[site.name]))
                parts.append(quantize_weight(W, recipe.weight, importance))
                error.add(W, parts[-1])
            quantized = QuantizedWeight.concatenate(parts)
            if not bool(torch.isfinite(quantized.scale).all()):
                raise CalibrationError(f"layer {layer} {linear}: the weight's scale is NaN or Inf", layer=layer)
            count += stored.numel()
            output.update(_packed_tensors(linear, quantized))
        output.update(_site_tensors(site, transform, recipe))
        report[site.name] = SiteReport(
            peak_before=peak_before,
            peak_after=_peak(transformed),
            output_nmse=error.nmse(),
        )
    # Norms, biases and linears that were left out keep 16 bits.
    output.update({name: folds.tensor(name, tensor).to(torch.bfloat16) for name, tensor in state.items()})
    return QuantizedLayer(tensors=output, report=report, quantized_weights=count)


def _row_blocks(W: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // W.shape[1])
    return (slice(first, first + step) for first in range(0, W.shape[0], step))


def _peak(X: Tensor) -> float:
    low, high = torch.aminmax(X)
    return float(torch.maximum(-low, high))


@dataclass(frozen=True)
class _Folds:
    """Where smoothing scales go: `columns` multiply what a site's linears read, `rows` divide what a linear writes."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    """By site name, (in_features,)."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """By linear name, (out_features,)."""

    def weight(self, linear: str, W: Tensor, block: slice) -> Tensor:
        """Return a float32 copy of a block of rows of a linear's weight, divided by their scales."""
        folded = W.float() if W.dtype != torch.float32 else W.clone()
        return folded.div_(self.rows[linear][block, None]) if linear in self.rows else folded

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor that stays in 16 bits, with its rows divided where its linear is folded into."""
        linear = name.rpartition(".")[0]
        if linear not in self.rows:
            return tensor
        rows = self.rows[linear]
        return tensor.float() / (rows[:, None] if tensor.dim() == 2 else rows)


def _smoothing(
    state: dict[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    sites: tuple[Site, ...],
    shape: LayerShape,
    recipe: Recipe,
) -> _Folds:
    """Fold the norms' scales into `state`; return what has to happen to the linears.

    Sites that fold into the rows of a linear come first: the linear's own site then sees the weight it will have.
    """
    folds = _Folds(columns={site.name: torch.ones_like(statistics[site.name].absmax) for site in sites})
    alpha = recipe.transform.smooth_alpha
    if alpha is None:
        return folds
    for site in sorted(sites, key=lambda site: site.fold_kind == "norm"):
        weight_absmax = torch.zeros_like(statistics[site.name].absmax)
        for linear in site.linears:
            stored = state[f"{linear}.weight"]
            for block in _row_blocks(stored):
                folded = folds.weight(linear, stored[block], block)
                weight_absmax = torch.maximum(weight_absmax, folded.abs_().amax(0))
        scale = smoothing_scale(statistics[site.name].absmax, weight_absmax, alpha)
        if site.fold_kind == "norm":
            gain = state[f"{site.fold_into}.weight"].to(scale.device, torch.bfloat16)
            state[f"{site.fold_into}.weight"], scale = exact_fold(gain, scale)
        elif site.fold_kind == "kv_rows":
            scale = share_over_heads(scale, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
            folds.rows[site.fold_into] = scale.view(shape.kv_heads, -1, shape.head_dim)[:, 0].reshape(-1)
        else:
            folds.rows[site.fold_into] = scale
        if not bool(torch.isfinite(scale).all()):
            raise CalibrationError(f"the smoothing scale of site {site.name} is NaN or Inf", site=site.name)
        folds.columns[site.name] = scale
    return folds


class _SiteError:
    """Sums the output error of a site's linears on the sampled rows, activations rounded as at run time."""

    def __init__(self, transformed: Float[Tensor, "sample channels"], recipe: Recipe) -> None:
        # A quarter of the rows tells the error well enough, at a quarter of the products.
        transformed = transformed[::_ERROR_ROW_STRIDE]
        self._X = transformed
        self._rounded = transformed
        if recipe.activation.bits < 16:
            clip = torch.full((2,), recipe.activation.clip_ratio, device=transformed.device)
            grid = row_grid(
                transformed, bits=recipe.activation.bits, symmetric=recipe.activation.symmetric, clip_ratio=clip
            )
            self._rounded = fake_quantize(transformed, grid)
        self._error = 0.0
        self._power = 0.0

    def add(self, W: Float[Tensor, "out_features in_features"], quantized: QuantizedWeight) -> None:
        exact = self._X @ W.T
        self._error += float((self._rounded @ quantized.dequantize().T - exact).square().sum())
        self._power += float(exact.square().sum())

    def nmse(self) -> float:
        return self._error / self._power if self._power else 0.0


def _packed_tensors(linear: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Return a linear's tensors in compressed-tensors' pack-quantized form."""
    tensors = {
        f"{linear}.weight_packed": pack(quantized.codes, bits=quantized.bits),
        f"{linear}.weight_scale": quantized.scale,
        f"{linear}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    # Packed along the rows, as that format has it.
    zero_point = pack(quantized.zero_point.to(torch.int8).T.contiguous(), bits=quantized.bits).T
    tensors[f"{linear}.weight_zero_point"] = zero_point.contiguous()
    return tensors


def _site_tensors(site: Site, transform: SiteTransform, recipe: Recipe) -> dict[str, Tensor]:
    """Return a site's online parts: rotations in float32, permutation, activation clip ratios (low end, high end)."""
    tensors = {f"{site.module}.act_clip_ratio": torch.full((2,), recipe.activation.clip_ratio)}
    if transform.R1 is not None:
        tensors[f"{site.module}.R1"] = transform.R1.float()
    if transform.perm is not None:
        tensors[f"{site.module}.perm"] = smallest_index_type(transform.perm)
    if transform.R2 is not None:
        tensors[f"{site.module}.R2"] = transform.R2.float()
    return tensors
