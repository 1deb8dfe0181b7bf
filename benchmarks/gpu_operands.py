"""What the GPU benchmark runs on: model shapes, random operands, and decoder layers of every kind."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from duquant.config import ActivationConfig, KVCacheConfig
from duquant.kernels.gpu import GpuBackend
from duquant.kernels.types import LinearWeight, PackedWeight, PreparedTransform, QuantizedActivation
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.transforms.hadamard import flat_orthogonal
from duquant.transforms.site import SiteTransform

BACKEND = GpuBackend()
KINDS = ("bf16", "rtn", "hadamard", "duquant", "duquant-blocks")
"""bf16; INT4 without a transform; one Hadamard rotation a site (QuaRot's kind); R1 P R2 with one R for all blocks; with
an R for each block."""


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder layer."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    block: int = 128

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (in_features, out_features) of the products of a layer: q, k, v together and gate, up together."""
        wide = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (self.hidden, wide),
            "o": (self.heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.mlp),
            "down": (self.mlp, self.hidden),
        }


LLAMA2_7B = Model("llama2-7b", 4096, 32, 32, 128, 11008)
LLAMA2_70B = Model("llama2-70b", 8192, 64, 8, 128, 28672)
TINY = Model("tiny", 32, 2, 1, 16, 64, block=32)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a seeded generator of a device."""
    return torch.Generator(device=device).manual_seed(seed)


def activation(tokens: int, width: int, device: torch.device, seed: int) -> Tensor:
    """Return bfloat16 rows with some channels 20 times the others, as in real models."""
    X = torch.randn(tokens, width, generator=generator(device, seed), device=device)
    X[:, :: max(1, width // 7)] *= 20
    return X.bfloat16()


def packed_weight(width: int, rows: int, device: torch.device, seed: int) -> LinearWeight:
    """Return random 4-bit codes with the scales of a weight of unit rows, made ready for the GPU backend."""
    g = generator(device, seed)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, width // 8), dtype=torch.int32, generator=g, device=device)
    scale = (0.5 + torch.rand(rows, 1, generator=g, device=device)) / (4.6 * width**0.5)
    zero_point = torch.randint(-2, 2, (rows, 1), generator=g, device=device).float()
    return BACKEND.prepare_weight([PackedWeight(words, scale, zero_point, width, 4)])


def transform(kind: str, width: int, block: int, device: torch.device, seed: int = 0) -> PreparedTransform:
    """Return a site's transform of one of the INT4 KINDS."""
    site = SiteTransform()
    if kind != "rtn":
        g = torch.Generator().manual_seed(seed)
        blocks = width // block if kind == "duquant-blocks" else 1
        signs = torch.randint(0, 2, (2, blocks, block, 1), generator=g) * 2 - 1
        R = (signs * flat_orthogonal(block)).float().to(device)  # (2, blocks, block, block)
        R = R if kind == "duquant-blocks" else R[:, 0]
        site = SiteTransform(R1=R[0])
        if kind != "hadamard":
            site = SiteTransform(R[0], torch.randperm(width, generator=g).to(device), R[1])
    return BACKEND.prepare_transform(site, ActivationConfig(), torch.ones(2, device=device))


def quantized(tokens: int, width: int, block: int, device: torch.device, seed: int) -> QuantizedActivation:
    """Return the codes of transformed random rows: products draw power by their data, so no zeros and no noise."""
    return BACKEND.transform_quantize_pack(
        activation(tokens, width, device, seed), transform("duquant", width, block, device)
    )


class Layer:
    """A decoder layer without its rotary embedding, which costs all kinds the same."""

    def __init__(self, model: Model, kind: str, device: torch.device, *, batch: int, context: int, seed: int) -> None:
        self.model, self.kind, self.batch, self.context = model, kind, batch, context
        self.norm = torch.ones(model.hidden, dtype=torch.bfloat16, device=device)
        self.quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=True), model.head_dim)
        self.product: dict[str, Callable[[Tensor], Tensor]] = {
            name: self._linear(width, rows, device, seed + index)
            for index, (name, (width, rows)) in enumerate(model.linears().items())
        }
        self.keys, self.values = (self._cache(device, seed + 10 + part) for part in range(2))
        self.bytes = sum(width * rows for width, rows in model.linears().values()) * (4 if kind == "bf16" else 1) // 2

    def _linear(self, width: int, rows: int, device: torch.device, seed: int) -> Callable[[Tensor], Tensor]:
        if self.kind == "bf16":
            W = torch.randn(rows, width, generator=generator(device, seed), device=device).bfloat16() / width**0.5
            return lambda X: linear(X, W)
        weight = packed_weight(width, rows, device, seed)
        site = transform(self.kind, width, self.model.block, device, seed)
        return lambda X: BACKEND.int4_linear(BACKEND.transform_quantize_pack(X, site), weight, None, torch.bfloat16)

    def _cache(self, device: torch.device, seed: int) -> Tensor | PackedKV:
        model = self.model
        shape = (self.batch, model.kv_heads, max(1, self.context), model.head_dim)
        states = torch.randn(shape, generator=generator(device, seed), device=device).bfloat16()
        return states if self.kind == "bf16" else self._packed(states)

    def _packed(self, states: Tensor) -> PackedKV:
        batch, heads, tokens, _head_dim = states.shape
        out = self.quantizer.empty(batch, heads, tokens, states.device)
        BACKEND.quantize_kv(states, self.quantizer, out)
        return out

    def cache_bytes(self) -> int:
        """Return the bytes of keys and values."""
        parts = [t for part in (self.keys, self.values) for t in (part if isinstance(part, PackedKV) else (part,))]
        return sum(t.numel() * t.element_size() for t in parts)

    def __call__(self, X: Tensor) -> Tensor:
        """Run rows of `batch` sequences: whole prompts when the layer has no context, else one new token each."""
        model = self.model
        hidden = rms_norm(X, (model.hidden,), self.norm)
        qkv = self.product["qkv"](hidden).view(self.batch, -1, model.heads + 2 * model.kv_heads, model.head_dim)
        Q, K, V = qkv.transpose(1, 2).split((model.heads, model.kv_heads, model.kv_heads), dim=1)
        attended = self._decode(Q, K, V) if self.context else self._prefill(Q, K, V)
        X = X + self.product["o"](attended.transpose(1, 2).reshape(X.shape[0], -1))
        gate, up = self.product["gate_up"](rms_norm(X, (model.hidden,), self.norm)).chunk(2, dim=-1)
        return X + self.product["down"](silu(gate) * up)

    def _prefill(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        if self.kind != "bf16":
            self.keys, self.values = self._packed(K), self._packed(V)
        return scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=self.model.heads != self.model.kv_heads)

    def _decode(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Put the new token where the last one lies, and attend to all of them."""
        for cache, new in ((self.keys, K), (self.values, V)):
            if isinstance(cache, PackedKV):
                BACKEND.quantize_kv(new, self.quantizer, PackedKV(*(part[:, :, -1:] for part in cache)))
            else:
                cache[:, :, -1:].copy_(new)
        scaling = self.model.head_dim**-0.5
        if isinstance(self.keys, PackedKV):
            assert isinstance(self.values, PackedKV)
            return BACKEND.int4_kv_attention(Q, self.keys, self.values, self.quantizer, scaling=scaling, mask=None)
        assert not isinstance(self.values, PackedKV)
        return scaled_dot_product_attention(
            Q, self.keys, self.values, scale=scaling, enable_gqa=self.model.heads != self.model.kv_heads
        )
