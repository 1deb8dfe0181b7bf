"""Compile the GPU kernels without a GPU, as the launchers would launch them, and say what came out.

    python benchmarks/gpu_compile.py [--arch 90 --arch 80 ...] [--quick] [--json FILE]

For every kernel: registers, stack (spills), shared memory and the tensor core instructions. Exits with 1 when one does
not compile, spills, or needs more shared memory than the architecture has.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

MAX_SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Opt-in shared memory of one block, by architecture (CUDA programming guide, table of compute capabilities)."""
_MATRIX_INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)\S*?\.(s32|f32)\.(\w+)\.\w+")


@dataclass(frozen=True)
class Compiled:
    """One compiled variant of a kernel."""

    kernel: str
    case: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    matrix_instructions: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """Say what is wrong with it."""
        if self.stack_bytes:
            return f"{self.stack_bytes} bytes of stack: registers are spilled"
        if self.shared_bytes > MAX_SHARED_BYTES[self.arch]:
            return f"{self.shared_bytes} bytes of shared memory, sm_{self.arch} has {MAX_SHARED_BYTES[self.arch]}"
        return None


class _CompileOnlyDriver:
    """What Triton asks of a driver before it compiles; nothing is ever launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_all(arch: int, *, is_quick: bool = False) -> list[Compiled]:
    """Compile every kernel of the given architecture for real shapes, from CPU tensors of those shapes."""
    import triton
    from triton.runtime.jit import JITFunction

    from duquant.kernels.gpu.launch import assume_capability

    found: list[Compiled] = []
    seen: set[str] = set()
    original = JITFunction.run
    case = [""]

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **{**kwargs, "warmup": True})
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_describe(kernel, self.fn.__name__, case[0], arch))
        return kernel

    triton.runtime.driver.set_active(_CompileOnlyDriver(arch))  # type: ignore[arg-type]
    assume_capability((arch // 10, arch % 10))
    JITFunction.run = record
    try:
        for case[0], run in _cases(is_quick):
            run()
    finally:
        JITFunction.run = original
    return found


def _describe(kernel: Any, name: str, case: str, arch: int) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert usage is not None, report
    found = {
        f"{'wgmma' if 'wgmma' in m.group(0) else 'mma'}.{m.group(1)}.{m.group(2)}.{m.group(3)}"
        for m in _MATRIX_INSTRUCTION.finditer(kernel.asm["ptx"])
    }
    return Compiled(
        kernel=name,
        case=case,
        arch=arch,
        registers=int(usage.group(1)),
        stack_bytes=int(usage.group(2)),
        shared_bytes=int(kernel.metadata.shared),
        warps=int(kernel.metadata.num_warps),
        matrix_instructions=tuple(sorted(found)),
    )


def _cases(is_quick: bool) -> list[tuple[str, Callable[[], object]]]:
    """Return (name, launch) of the variants that a 7B model runs, of every kernel at least one."""
    if is_quick:
        return [
            *[_linear_case(tokens, 4096, 4096) for tokens in (1, 2048)],
            _transform_case(1, 4096, is_shared=True),
            _transform_case(2048, 4096, is_shared=False),
            _attention_case(1, 4096, 8),
        ]
    shapes = ((4096, 12288), (4096, 4096), (11008, 4096), (28672, 8192))
    return [
        *[_linear_case(tokens, *shape) for tokens in (1, 32, 64, 256, 2048) for shape in shapes],
        *[
            _transform_case(t, w, is_shared=s)
            for t in (1, 64, 2048)
            for w in (4096, 11008, 28672)
            for s in (True, False)
        ],
        *[_transform_case(t, w, is_shared=True, is_rotated=False) for t in (1, 2048) for w in (4096, 11008)],
        *[_attention_case(batch, 2048, shared) for batch in (1, 64) for shared in (1, 8)],
    ]


def _linear_case(tokens: int, width: int, rows: int) -> tuple[str, Callable[[], object]]:
    def run() -> None:
        from duquant.kernels.gpu.backend import GpuBackend
        from duquant.kernels.types import LinearWeight, QuantizedActivation

        backend = GpuBackend()
        column = torch.zeros(tokens, 1)
        row = torch.zeros(rows, 1)
        X = QuantizedActivation(
            torch.zeros(tokens, width // 2, dtype=torch.uint8), column, column, column, in_features=width, bits=4
        )
        words = torch.zeros(rows, width // 8, dtype=torch.int32)
        W = LinearWeight(words, row, row, row, in_features=width, bits=4, splits=(rows,), backend=backend)
        backend.int4_linear(X, W, None, torch.bfloat16)

    return f"linear {tokens} x {width} x {rows}", run


def _transform_case(
    tokens: int, width: int, *, is_shared: bool, is_rotated: bool = True
) -> tuple[str, Callable[[], object]]:
    def run() -> None:
        from duquant.config import ActivationConfig
        from duquant.kernels.gpu.backend import GpuBackend
        from duquant.transforms.site import SiteTransform

        backend = GpuBackend()
        R = torch.zeros((128, 128) if is_shared else (width // 128, 128, 128))
        transform = SiteTransform(R, torch.arange(width), R) if is_rotated else SiteTransform()
        prepared = backend.prepare_transform(transform, ActivationConfig(), torch.ones(2))
        backend.transform_quantize_pack(torch.zeros(tokens, width, dtype=torch.bfloat16), prepared)

    kind = "none" if not is_rotated else "shared R" if is_shared else "an R for each block"
    return f"transform {tokens} x {width}, {kind}", run


def _attention_case(batch: int, context: int, shared: int) -> tuple[str, Callable[[], object]]:
    def run() -> None:
        from duquant.config import KVCacheConfig
        from duquant.kernels.gpu.backend import GpuBackend
        from duquant.quantizers.kv import KVQuantizer, PackedKV

        heads, head_dim = 32 // shared, 128
        quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=True), head_dim)
        packed = PackedKV(
            torch.zeros(1, heads, context, head_dim // 2, dtype=torch.uint8).expand(batch, -1, -1, -1),
            torch.zeros(1, heads, context, 1, dtype=torch.float16).expand(batch, -1, -1, -1),
            torch.zeros(1, heads, context, 1, dtype=torch.float16).expand(batch, -1, -1, -1),
        )
        Q = torch.zeros(batch, heads * shared, 1, head_dim, dtype=torch.bfloat16)
        backend = GpuBackend()
        backend.int4_kv_attention(Q, packed, packed, quantizer, scaling=0.1, mask=None)
        sinks = Q[:, :heads].expand(-1, -1, 4, -1)
        backend.int4_kv_attention(Q, packed, packed, quantizer, scaling=0.1, mask=None, sinks=(sinks, sinks))
        one = quantizer.empty(batch, heads, 1, Q.device)
        backend.quantize_kv(Q[:, :heads], quantizer, one)
        backend.dequantize_kv(one, quantizer, torch.bfloat16)

    return f"attention, batch {batch}, {context} tokens, {shared} heads a key", run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(MAX_SHARED_BYTES), help="90 by default")
    parser.add_argument("--quick", action="store_true", help="each kernel about once")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args()
    rows = [row for arch in arguments.arch or [90] for row in compile_all(arch, is_quick=arguments.quick)]
    for row in rows:
        print(
            f"sm_{row.arch} {row.kernel:24} {row.registers:3} registers {row.shared_bytes:6} B shared "
            f"{row.warps:2} warps  "
            f"{' '.join(row.matrix_instructions) or '-':32} {row.case}{'  ' + row.fault if row.fault else ''}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.fault for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
