"""The kernel benchmark of an artifact: a layer and the whole model beside bfloat16, RTN, Hadamard and DuQuant."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duquant import kernels
from duquant.config import ActivationConfig, Recipe
from duquant.errors import KernelError, UnsupportedModelError
from duquant.evaluation.contender_names import ARTIFACT, BFLOAT16, RTN
from duquant.evaluation.contenders import Transforms, dense_twin, linear_bytes
from duquant.evaluation.loading import LoadedModel
from duquant.evaluation.plan import SpeedConfig
from duquant.evaluation.subjects import Call, Load, cache_bytes, layer_call, model_call
from duquant.evaluation.timing import ceilings, interleaved, poisoned_memory
from duquant.inference.modules import SiteModule
from duquant.kernels.reference import ReferenceBackend

_GATE_TOKENS = 48
_MOST_ROUNDS, _LEAST_ROUNDS = 15, 3
_UNTIMED_CALLS = 1
"""Of each contender before its samples: a warm-up, which also tells how many samples there is time for."""
_FLUSH_BYTES = {"cpu": 128_000_000, "cuda": 256_000_000}
"""Written before each call of a single layer: more than any cache holds, since in a model other layers come between."""
_CEILING_ROUNDS = 5
_CAUTION = 1.5
"""How much longer than at the ceilings a call is thought to take, before anything is known of it."""
_FREE_SHARE = 0.8
"""Of the free memory, what a contender may take."""


@torch.inference_mode()
def measure_speed(
    loaded: LoadedModel, config: SpeedConfig, *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Time a layer and the whole model: decode of each batch, and prefill of one sequence.

    All contenders are timed in turns after a check of their results; each figure is a median of wall times with the
    20th and 80th percentile. A layer is timed with cold caches. The inputs are random tokens. On a GPU every launch is
    part of the time: there are no CUDA graphs (`make bench-gpu` has them).

    Args:
        loaded: an artifact; of an unquantized model only itself is timed.
        config: sizes, and about how long it may take. What does not fit is left out and listed under `skipped`.
        on_progress: called with rows done and rows in all.

    Returns:
        artifact: the contender that is the artifact itself (rtn, hadamard or duquant; null for an unquantized model);
        layer and model: rows of phase, batch, tokens, context, times (by contender), tokens_per_second, speedup (over
        bfloat16), transform_overhead (over RTN on the same kernel, minus 1) and, for decodes, cache_bytes;
        memory: bytes of the linears; ceilings, checked, skipped, device, threads, kernels, seconds.

    Raises:
        KernelError: a kernel's result is wrong. Nothing is timed then.
    """
    bench = _Bench(loaded, config)
    try:
        bench.check()
        limits = ceilings(loaded.device, rounds=_CEILING_ROUNDS)
        bench.rates = limits["giga_per_second"]
        rows = bench.rows(on_progress or (lambda _done, _total: None))
    finally:
        bench.restore()
    return {
        "artifact": bench.own,
        "device": loaded.device.type,
        "threads": torch.get_num_threads(),
        "kernels": next(row["reason"] for row in kernels.describe() if row["available"]),
        **rows,
        "memory": bench.memory(),
        "ceilings": limits,
        "checked": bench.checked,
        "skipped": bench.skipped,
        "budget_seconds": config.seconds,
        "seconds": time.perf_counter() - bench.started,
    }


def _loads(config: SpeedConfig) -> list[Load]:
    """Return what is timed, the cheapest first."""
    decodes = [
        Load("decode", batch=batch, tokens=batch, context=config.context) for batch in sorted(config.decode_batches)
    ]
    return [*decodes[:1], Load("prefill", batch=1, tokens=config.prefill_tokens, context=0), *decodes[1:]]


@dataclass
class _Bench:
    """The contenders of one artifact, and the time that is left."""

    loaded: LoadedModel
    config: SpeedConfig
    rates: dict[str, float] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self._model, self._recipe = self.loaded.model, self.loaded.recipe
        self._scope = "layer"
        self._layer_s: dict[Load, float] = {}
        self._transforms: Transforms | None = None
        self._dense: Any = None if self._recipe is not None else self._model
        self._flush = torch.empty(
            _FLUSH_BYTES[self.loaded.device.type] // 4, dtype=torch.int32, device=self._model.device
        )
        self._dense_bytes = _dense_bytes(self._model)
        if self._recipe is not None and _has_contenders(self._recipe):
            self._transforms = Transforms(self._model, self._recipe)

    @property
    def own(self) -> str | None:
        """Return which contender the artifact is."""
        if self._transforms is not None:
            return self._transforms.own
        return None if self._recipe is None else ARTIFACT

    def check(self) -> None:
        """Compare every contender's products in the first layer with the reference's.

        Raises:
            KernelError: one is wrong.
        """
        if self._transforms is None:
            return
        assert self._recipe is not None
        sites = [m for m in self._model.model.layers[0].modules() if isinstance(m, SiteModule)]
        # The kernels join weights at the first use.
        self._model.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._model.device))
        for kind in self._transforms.kinds:
            self._transforms.use(kind)
            with poisoned_memory():
                worst = max(_check_site(kind, site, self._recipe.activation) for site in sites)
            self.checked.append(
                f"{kind}: products of a layer have every bit of the reference's, codes at most {worst:.2f} steps off"
            )

    def restore(self) -> None:
        """Give the artifact its own transforms back."""
        if self._transforms is not None:
            self._transforms.use(self._transforms.own)

    def rows(self, report: Callable[[int, int], None]) -> dict[str, list[dict[str, Any]]]:
        """Time everything that fits, by scope."""
        rows: dict[str, list[dict[str, Any]]] = {"layer": [], "model": []}
        loads = _loads(self.config)
        left = total = len(rows) * len(loads)
        for scope in rows:
            self._enter(scope)
            for load in loads:
                if (row := self._row(load, rows_left=left)) is not None:
                    rows[scope].append(row)
                left -= 1
                report(total - left, total)
            rows[scope].sort(key=lambda row: (row["phase"] != "prefill", row["batch"]))
        return rows

    def _enter(self, scope: str) -> None:
        """Turn to the layer or to the whole model; the bfloat16 contender is made of as many layers."""
        self._scope = scope
        if self._recipe is None:
            return
        layers = 1 if scope == "layer" else len(self._model.model.layers)
        self._dense = None  # the other scope's is freed first
        needed = self._dense_bytes * layers / len(self._model.model.layers)
        if needed > _FREE_SHARE * _free_bytes(self.loaded.device):
            self._skip(BFLOAT16, f"{needed / 1e9:.1f} GB of weights do not fit the free memory")
            return
        try:
            self._dense = dense_twin(self._model, layers=layers)
        except UnsupportedModelError as err:
            self._skip(BFLOAT16, str(err))

    def _row(self, load: Load, *, rows_left: int) -> dict[str, Any] | None:
        """Time all contenders under a load; None, with a line in `skipped`, when the time or the memory is short."""
        kinds = self._kinds()
        expected = self._expected_s(load, kinds) * (_UNTIMED_CALLS + _LEAST_ROUNDS)
        left = self.config.seconds - (time.perf_counter() - self.started)
        # The first row is always measured: a result without any would be no result.
        if expected > left and rows_left < 2 * len(_loads(self.config)):
            self._skip(str(load), f"it takes about {expected:.0f} s, and {max(0.0, left):.0f} s of the time are left")
            return None
        layers = 1 if self._scope == "layer" else len(self._model.model.layers)
        held = {kind: cache_bytes(self._subject(kind), load, layers=layers) for kind in kinds}
        if sum(held.values()) > _FREE_SHARE * _free_bytes(self.loaded.device):
            self._skip(str(load), f"{sum(held.values()) / 1e9:.1f} GB of caches do not fit the free memory")
            return None
        make = layer_call if self._scope == "layer" else model_call
        calls = {kind: make(self._subject(kind), load) for kind in kinds}
        times = interleaved(
            calls,
            rounds=self._rounds(calls, left / rows_left),
            least_s=0.0,  # one call a sample: a second one of a layer would find warm caches
            before={kind: self._before(kind) for kind in kinds},
            synchronize=self._synchronize,
        )
        return self._summary(load, times, held)

    def memory(self) -> dict[str, Any]:
        """Return the bytes of the linears' weights, and of all parameters."""
        found: dict[str, Any] = {"parameters": self.loaded.parameter_bytes}
        if self._recipe is not None:
            found["linears"] = linear_bytes(self._model)
        return found

    def _kinds(self) -> list[str]:
        int4 = [] if self._recipe is None else [ARTIFACT]
        if self._transforms is not None:
            int4 = list(self._transforms.kinds)
        return int4 if self._dense is None else [BFLOAT16, *int4]

    def _subject(self, kind: str) -> Any:
        return self._dense if kind == BFLOAT16 else self._model

    def _before(self, kind: str) -> Call:
        def prepare() -> None:
            if self._transforms is not None and kind != BFLOAT16:
                self._transforms.use(kind)
            if self._scope == "layer":
                self._flush.fill_(1)
            self._synchronize()

        return prepare

    def _rounds(self, calls: dict[str, Call], seconds: float) -> int:
        """Return how many rounds fit, from one call of each."""
        started = time.perf_counter()
        for kind, call in calls.items():
            self._before(kind)()
            call()
        self._synchronize()
        one = time.perf_counter() - started
        return max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(seconds / one) - _UNTIMED_CALLS))

    def _expected_s(self, load: Load, kinds: Sequence[str]) -> float:
        """Return about how long one call of each contender takes: by one layer's, once that is known."""
        layers = len(self._model.model.layers)
        if self._scope == "model" and load in self._layer_s:
            return self._layer_s[load] * layers
        share = 1 if self._scope == "model" else layers
        # Bytes in bfloat16, and as many operations for each token.
        weights = self._dense_bytes / share
        # The same for queries, keys and values: each token with each that it attends to.
        states = 4.0 * self._model.config.hidden_size * layers / share
        attended = load.batch * load.context if load.phase == "decode" else load.tokens**2 / 2
        operations = weights * load.tokens + states * attended
        read = weights + (states * attended if load.phase == "decode" else 0)
        one: float = (operations / self.rates["bfloat16 product"] + read / self.rates["read"]) / 1e9
        return _CAUTION * one * len(kinds)

    def _summary(self, load: Load, times: dict[str, dict[str, float]], held: dict[str, int]) -> dict[str, Any]:
        medians = {kind: spread["median_ms"] for kind, spread in times.items()}
        if self._scope == "layer":
            self._layer_s[load] = sum(medians.values()) / 1e3
        row: dict[str, Any] = {
            "phase": load.phase,
            "batch": load.batch,
            "tokens": load.tokens,
            "context": load.context,
            "times": times,
            "tokens_per_second": {kind: round(load.tokens / ms * 1e3, 1) for kind, ms in medians.items()},
        }
        if BFLOAT16 in medians:
            row["speedup"] = {
                kind: round(medians[BFLOAT16] / ms, 3) for kind, ms in medians.items() if kind != BFLOAT16
            }
        if RTN in medians:
            row["transform_overhead"] = {
                kind: round(ms / medians[RTN] - 1, 3) for kind, ms in medians.items() if kind not in (BFLOAT16, RTN)
            }
        if load.phase == "decode":
            row["cache_bytes"] = held
        return row

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.append({"scope": self._scope, "what": what, "reason": reason})

    def _synchronize(self) -> None:
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)


def _has_contenders(recipe: Recipe) -> bool:
    """Whether other transforms can take the places of an artifact's own: not where grids or codes go by channel."""
    activation = recipe.activation
    return activation.bits < 16 and activation.group_size is None and not recipe.outlier_channels


def _check_site(kind: str, site: SiteModule, activation: ActivationConfig) -> float:
    """Return how many steps the codes of random rows are off the reference's at most.

    Raises:
        KernelError: it is more than bfloat16 rotations explain, or a product is not the reference's.
    """
    reference, prepared = ReferenceBackend(), site.prepared()
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_GATE_TOKENS, site.width, generator=generator).bfloat16().to(prepared.clip_ratio.device)
    q = kernels.transform_quantize_pack(X, prepared)
    expected = reference.transform_quantize_pack(
        X, reference.prepare_transform(prepared.transform, activation, prepared.clip_ratio)
    )
    off = (_values(q) - _values(expected)).abs() / expected.scale
    worst = float(off.max())
    # A step of rounding, and 2^-8 of the row's range on both sides, from bfloat16.
    if not worst <= 1 + 2 * (2**activation.bits - 1) / 2**8:
        raise KernelError(f"the {kind} transform is wrong by {worst:.2f} steps on this machine; nothing was timed")
    for readers in site.readers:
        W = readers.joined
        if W is None:
            continue
        Y = kernels.int4_linear(q, W)
        if not torch.equal(Y, reference.int4_linear(q, W, None, torch.float32)):
            raise KernelError(f"an INT4 product ({kind}) is wrong on this machine; nothing was timed")
    return worst


def _dense_bytes(model: Any) -> float:
    """Return the bytes of the layers' linears in bfloat16."""
    if any(isinstance(module, SiteModule) for module in model.modules()):
        return float(linear_bytes(model)["bfloat16"])
    numbers: int = sum(p.numel() for p in model.model.layers.parameters())
    return 2.0 * numbers


def _values(q: kernels.QuantizedActivation) -> Tensor:
    return (q.codes.float() - q.zero_point) * q.scale


def _free_bytes(device: torch.device) -> float:
    """Return the memory that is free on a device; infinity where nothing says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return float(value.split()[0]) * 1024
    return float("inf")
