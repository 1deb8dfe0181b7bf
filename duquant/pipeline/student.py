"""A quantized decoder layer whose scales and norm gains are learned.

It runs as its shard would, but for 4-bit codes that bfloat16 moves by a step, and gradients pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duquant.artifact.layout import KEY_SMOOTHING
from duquant.config import Recipe
from duquant.models.architecture import Site
from duquant.models.skeleton import COMPUTE_DTYPE, Skeleton
from duquant.pipeline.patching import patched, plain_linear
from duquant.pipeline.rounded import RoundedStates, rounded_rows
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer
from duquant.quantizers.packing import unpack
from duquant.transforms.site import SiteTransform

_BETAS = (0.9, 0.95)
_COARSE_BITS = 4


class _StudentSite:
    """What is done to the inputs of a site: its linears share one rounded tensor."""

    def __init__(self, site: Site, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
        perm = tensors.get(f"{site.module}.perm")
        self._transform = SiteTransform(
            tensors.get(f"{site.module}.R1"), None if perm is None else perm.long(), tensors.get(f"{site.module}.R2")
        )
        self._clip_ratio = tensors[f"{site.module}.act_clip_ratio"]
        self._config = recipe.activation
        self._seen: tuple[Tensor, Tensor] | None = None

    def rounded(self, X: Float[Tensor, "*batch channels"]) -> Float[Tensor, "tokens channels"]:
        """Return transformed and rounded rows."""
        if self._seen is None or self._seen[0] is not X:
            rows = X.reshape(-1, X.shape[-1])
            # A step of a 4-bit grid is twenty times what bfloat16 loses, and rotations take half the time in it.
            rows = self._transform.apply(rows if self._config.bits <= _COARSE_BITS else rows.float())
            self._seen = X, rounded_rows(rows, self._config, self._clip_ratio).to(COMPUTE_DTYPE)
        return self._seen[1]

    def forget(self) -> None:
        """Let go of the last input: its graph is used up."""
        self._seen = None


class _StudentLinear:
    """A packed linear with a factor on each scale, exp(log_factor), which is learned."""

    def __init__(self, linear: str, tensors: Mapping[str, Tensor], site: _StudentSite, bits: int) -> None:
        self._site, self._bits = site, bits
        self._packed = tensors[f"{linear}.weight_packed"]
        self._channels = int(tensors[f"{linear}.weight_shape"][1])
        self._scale = tensors[f"{linear}.weight_scale"]
        words = tensors[f"{linear}.weight_zero_point"].T.contiguous()
        self._zero_point = unpack(words, self._scale.shape[0], bits=bits).T
        self._bias = tensors.get(f"{linear}.bias")
        self.log_factor = nn.Parameter(torch.zeros_like(self._scale))

    def forward(self, X: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Return what the packed linear would, in the dtype of `X`."""
        rows, scale = self._site.rounded(X), self.scale()
        if scale.shape[1] == 1:
            # Whole numbers are exact in bfloat16, and the weight needs no gradient when its scale comes behind.
            Y = nn.functional.linear(rows, self._numbers()).float() * scale[:, 0]
        else:
            grouped = self._numbers().view(*scale.shape, -1) * scale[..., None]
            Y = nn.functional.linear(rows, grouped.view(scale.shape[0], -1).to(COMPUTE_DTYPE))
        Y = Y if self._bias is None else Y + self._bias
        return Y.to(X.dtype).view(*X.shape[:-1], -1)

    def scale(self) -> Float[Tensor, "out_features groups"]:
        """Return the scales as learned, float32."""
        return self._scale * self.log_factor.exp()

    def _numbers(self) -> Float[Tensor, "out_features in_features"]:
        """Return the codes less their zero points."""
        codes = unpack(self._packed, self._channels, bits=self._bits)
        grouped = codes.view(*self._scale.shape, -1).to(COMPUTE_DTYPE) - self._zero_point[..., None]
        return grouped.view(codes.shape)


class _StudentNorm:
    """A norm with a factor on each gain, exp(log_factor), which is learned. It multiplies by (offset + weight)."""

    def __init__(self, weight: Float[Tensor, " channels"], offset: float) -> None:
        self._gain = weight.float() + offset
        self._offset = offset
        self.log_factor = nn.Parameter(torch.zeros_like(self._gain))

    def forward(self, plain: Callable[[Tensor], Tensor], X: Float[Tensor, "*batch channels"]) -> Tensor:
        """Return what the norm gives, times the factor."""
        return plain(X) * self.log_factor.exp().to(X.dtype)

    def weight(self) -> Float[Tensor, " channels"]:
        """Return the weight as learned, in the dtype that it is stored in."""
        return (self._gain * self.log_factor.exp() - self._offset).to(torch.bfloat16)


class StudentLayer:
    """One layer, with an optimizer of its own.

    Args:
        tensors: of its shard, by their names inside the layer.
        sites: those that are quantized.
        recipe: what it was quantized with.
        skeleton: lends the modules.
        layer: its index.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...], recipe: Recipe, skeleton: Skeleton, layer: int
    ) -> None:
        self._skeleton, self._layer = skeleton, layer
        self._tensors = dict(tensors)
        here = {name: tensor.to(skeleton.device) for name, tensor in tensors.items()}
        self._sites: list[_StudentSite] = []
        self._linears: dict[str, _StudentLinear] = {}
        self._norms: dict[str, _StudentNorm] = {}
        for site in sites:
            self._sites.append(_StudentSite(site, here, recipe))
            for linear in site.linears:
                self._linears[linear] = _StudentLinear(linear, here, self._sites[-1], recipe.weight.bits)
            if site.fold.kind == "norm":
                for norm in site.fold.into:
                    self._norms[norm] = _StudentNorm(here[f"{norm}.weight"], site.fold.gain_offset)
        # Modules want weights where there are none; nothing reads them.
        nothing = torch.zeros((), dtype=COMPUTE_DTYPE, device=skeleton.device)
        shapes = skeleton.layer_names(layer)
        self._state = {name: here[name] if name in here else nothing.expand(shapes[name]) for name in shapes}
        quantizer = KVQuantizer(recipe.kv_cache, skeleton.head_dim) if recipe.kv_cache.bits < 16 else None
        smoothing = None
        if recipe.kv_cache.smooth_keys:
            smoothing = KeySmoothing(*(here[f"{KEY_SMOOTHING}.{name}"] for name in ("center", "smooth_scale")))
        self._cache = RoundedStates(quantizer, smoothing=smoothing)
        self._optimizer = torch.optim.Adam(self.parameters(), betas=_BETAS) if self._linears else None

    @contextmanager
    def running(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield what runs the layer on (batch, seq, hidden)."""
        with self._skeleton.layer(self._layer, self._state) as module:
            module.requires_grad_(False)
            forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
            for name, linear in self._linears.items():
                forwards[plain_linear(module, name)] = linear.forward
            for name, norm in self._norms.items():
                forwards[module.get_submodule(name)] = partial(norm.forward, module.get_submodule(name).forward)
            with patched(forwards):
                yield lambda X: self._skeleton.forward(module, X, cache=self._cache)
        for site in self._sites:
            site.forget()

    def parameters(self) -> list[nn.Parameter]:
        """Return what is learned: logarithms."""
        scales = [linear.log_factor for linear in self._linears.values()]
        return scales + [norm.log_factor for norm in self._norms.values()]

    @property
    def is_finite(self) -> bool:
        """Whether all gradients are numbers."""
        found = (parameter.grad for parameter in self.parameters())
        return all(bool(torch.isfinite(gradient).all()) for gradient in found if gradient is not None)

    def step(self, rate: float) -> None:
        """Move what is learned against its gradients, and forget these."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the layer's shard as learned, on the CPU."""
        scales = {f"{name}.weight_scale": linear.scale().cpu() for name, linear in self._linears.items()}
        gains = {f"{name}.weight": norm.weight().cpu() for name, norm in self._norms.items()}
        return {**self._tensors, **scales, **gains}
