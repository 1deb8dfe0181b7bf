"""The modules of a quantized model: a transform per site, and linears that read it."""

import weakref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duquant.config import Recipe
from duquant.kernels import (
    PackedWeight,
    QuantizedActivation,
    fake_linear,
    int4_linear,
    prepare_transform,
    prepare_weight,
    transform_quantize_pack,
)
from duquant.quantizers.packing import unpack
from duquant.transforms.rotation import resolve_block_size
from duquant.transforms.site import SiteTransform


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class SiteModule(nn.Module):
    """Online part of one site: R1, P, R2, and rounding. Its linears share one result for the same input tensor."""

    def __init__(self, width: int, consumers: int, recipe: Recipe) -> None:
        super().__init__()
        self._config = recipe.activation
        self._consumers = consumers
        self.act_clip_ratio = _frozen((2,), torch.float32)
        transform = recipe.transform
        self.R1: nn.Parameter | None = None
        self.perm: nn.Parameter | None = None
        self.R2: nn.Parameter | None = None
        if transform.rotation != "none":
            n = resolve_block_size(width, transform.block_size)
            shape = (n, n) if transform.shared_rotation else (width // n, n, n)
            self.R1 = _frozen(shape, torch.float32)
            if transform.permutation != "none":
                self.perm = _frozen((width,), torch.int16 if width <= 2**15 else torch.int32)
                self.R2 = _frozen(shape, torch.float32)
        self._seen: weakref.ref[Tensor] | None = None
        self._version = 0
        self._uses = 0
        self._result: QuantizedActivation | Tensor | None = None

    def forward(self, X: Float[Tensor, "*batch channels"]) -> QuantizedActivation | Tensor:
        """Return rounded codes of the transformed rows, or the transformed rows in float32 for 16-bit activations.

        q, k and v (gate and up) call this one after the other with the same tensor; the work is done for the first and
        forgotten after the last. The tensor is recognised by identity, held weakly.
        """
        # In inference mode tensors count no versions, and in-place changes of an input are not done there.
        version = 0 if X.is_inference() else X._version
        if self._seen is None or self._seen() is not X or self._version != version or self._result is None:
            self._result = self._compute(X.reshape(-1, X.shape[-1]))
            self._seen, self._version = weakref.ref(X), version
            self._uses = 0
        result = self._result
        self._uses += 1
        if self._uses >= self._consumers:
            self._seen = self._result = None
        return result

    def _compute(self, rows: Tensor) -> QuantizedActivation | Tensor:
        perm = None if self.perm is None else self.perm.long()
        transform = SiteTransform(R1=self.R1, perm=perm, R2=self.R2)
        if self._config.bits == 16:
            return transform.apply(rows.float())
        return transform_quantize_pack(rows, prepare_transform(transform, self._config, self.act_clip_ratio))


class DuQuantLinear(nn.Module):
    """A linear whose weight stays packed. Parameters are those of compressed-tensors' pack-quantized format."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, recipe: Recipe, site: SiteModule) -> None:
        super().__init__()
        weight = recipe.weight
        per_word = 32 // weight.bits
        groups = in_features // weight.group_size if weight.group_size else 1
        self.in_features, self.out_features, self.bits = in_features, out_features, weight.bits
        self.weight_packed = _frozen((out_features, -(-in_features // per_word)), torch.int32)
        self.weight_scale = _frozen((out_features, groups), torch.float32)
        self.weight_zero_point = _frozen((-(-out_features // per_word), groups), torch.int32)
        self.weight_shape = _frozen((2,), torch.int64)
        self.bias = _frozen((out_features,), torch.bfloat16) if bias else None
        # In a tuple, so that the shared site is not registered as a submodule of every linear that reads it.
        self._site = (site,)

    def forward(self, X: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Return X W.T + bias in the dtype of `X`."""
        site = self._site[0](X)
        if isinstance(site, QuantizedActivation):
            Y = int4_linear(site, prepare_weight([self._weight()]), bias=self.bias, dtype=X.dtype)
        else:
            Y = fake_linear(site, self._weight())
            Y = (Y if self.bias is None else Y + self.bias.float()).to(X.dtype)
        return Y.view(*X.shape[:-1], self.out_features)

    def _weight(self) -> PackedWeight:
        # (groups, words) along the rows -> (out_features, groups)
        zero_point = unpack(self.weight_zero_point.T.contiguous(), self.out_features, bits=self.bits).T.float()
        return PackedWeight(self.weight_packed, self.weight_scale, zero_point, self.in_features, self.bits)

    def dequantized_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the float32 weight, in the transformed basis, that the packed codes stand for."""
        W = self._weight()
        codes = unpack(W.packed, W.in_features, bits=W.bits)
        grouped = codes.view(self.out_features, W.scale.shape[1], -1).float()
        return ((grouped - W.zero_point[..., None]) * W.scale[..., None]).view(codes.shape)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
