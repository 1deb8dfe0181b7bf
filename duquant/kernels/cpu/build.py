"""Compiling the CPU kernels on first use, with the system's C++ compiler, into a cache that processes share."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from duquant.errors import KernelUnavailableError
from duquant.kernels.settings import CACHE, setting

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
# No contraction of a * b + c into one rounding: outputs must have the bits of the reference.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wno-psabi")
# Where no bits are promised; the later flag counts.
_FUSED = ("-ffp-contract=fast",)
_AVX2 = ("-mavx2", "-mf16c")
_AVX512 = (*_AVX2, "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512vbmi")
_AMX = (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class _Unit:
    """One object file; those of an instruction set that the compiler does not know are left out together."""

    source: str
    isa: str = ""
    flags: tuple[str, ...] = ()


_PORTABLE = (
    _Unit("api.cpp"),
    _Unit("threads.cpp"),
    _Unit("linear_portable.cpp", flags=("-DDUQUANT_SUFFIX=portable",)),
    _Unit("rows.cpp", flags=("-DDUQUANT_SUFFIX=portable",)),
    _Unit("kv.cpp", flags=("-DDUQUANT_SUFFIX=portable",)),
    _Unit("norm.cpp", flags=("-DDUQUANT_SUFFIX=portable",)),
    _Unit("attend.cpp", flags=("-DDUQUANT_SUFFIX=portable", *_FUSED)),
)
_X86 = (
    _Unit("linear_portable.cpp", "AVX2", (*_AVX2, "-DDUQUANT_SUFFIX=avx2", "-DDUQUANT_COMPILE_AVX2")),
    _Unit("rows.cpp", "AVX2", (*_AVX2, "-DDUQUANT_SUFFIX=avx2")),
    _Unit("kv.cpp", "AVX2", (*_AVX2, "-DDUQUANT_SUFFIX=avx2")),
    _Unit("norm.cpp", "AVX2", (*_AVX2, "-DDUQUANT_SUFFIX=avx2")),
    _Unit("attend.cpp", "AVX2", (*_AVX2, "-DDUQUANT_SUFFIX=avx2", *_FUSED)),
    _Unit("linear_vnni.cpp", "AVX512", _AVX512),
    _Unit("rows.cpp", "AVX512", (*_AVX512, "-DDUQUANT_SUFFIX=avx512")),
    _Unit("kv.cpp", "AVX512", (*_AVX512, "-DDUQUANT_SUFFIX=avx512")),
    _Unit("norm.cpp", "AVX512", (*_AVX512, "-DDUQUANT_SUFFIX=avx512")),
    _Unit("attend.cpp", "AVX512", (*_AVX512, "-DDUQUANT_SUFFIX=avx512", *_FUSED)),
    _Unit("linear_amx.cpp", "AMX", _AMX),
    _Unit("transform_amx.cpp", "AMX", _AMX),
)


def library_path() -> Path:
    """Return the compiled library; compile it when the cache has none for these sources, compiler and flags.

    Any number of processes may do this at once: one compiles, the others wait for it, and a rename publishes.

    Raises:
        KernelUnavailableError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    units = [*_PORTABLE, *(_X86 if platform.machine() in ("x86_64", "AMD64") else ())]
    target = cache_folder() / f"cpu-kernels-{_key(compiler, units)}.so"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
                        _build(compiler, units, Path(folder)).replace(target)
        except OSError as err:
            raise KernelUnavailableError(f"the compiled kernels cannot be written to {target.parent}: {err}") from err
    return target


def find_compiler() -> str:
    """Return the path of a C++ compiler.

    Raises:
        KernelUnavailableError: there is none.
    """
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise KernelUnavailableError(f"no C++ compiler on this machine (looked for {', '.join(COMPILERS)})")


def cache_folder() -> Path:
    """Return where compiled kernels are kept: DUQUANT_CACHE_DIR, else the user's cache folder."""
    chosen = setting(CACHE) or setting("XDG_CACHE_HOME")
    try:
        return Path(chosen) / "duquant" if chosen else Path.home() / ".cache" / "duquant"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / f"duquant-{os.getuid()}"


def _key(compiler: str, units: list[_Unit]) -> str:
    """Return a digest of everything that decides the library's bytes."""
    digest = hashlib.sha256(repr((_FLAGS, units, platform.machine())).encode())
    digest.update(_run([compiler, "--version"], compiler).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _build(compiler: str, units: list[_Unit], folder: Path) -> Path:
    isas = {unit.isa for unit in units if unit.isa}
    for isa in sorted(isas):
        probe = next(unit for unit in units if unit.isa == isa)
        empty = folder / "empty.cpp"
        empty.write_text("")
        try:
            _run([compiler, *probe.flags, "-c", str(empty), "-o", str(folder / "empty.o")], compiler)
        except KernelUnavailableError:
            isas.remove(isa)  # an old compiler: the machine's newest instructions stay unused
    defines = [f"-DDUQUANT_{isa}" for isa in sorted(isas)]
    kept = [unit for unit in units if not unit.isa or unit.isa in isas]

    def compile_unit(numbered: tuple[int, _Unit]) -> str:
        index, unit = numbered
        out = folder / f"{index}.o"
        _run([compiler, *_FLAGS, *defines, *unit.flags, "-c", str(SOURCES / unit.source), "-o", str(out)], compiler)
        return str(out)

    with ThreadPoolExecutor(max_workers=min(len(kept), os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_unit, enumerate(kept)))
    linked = folder / "kernels.so"
    _run([compiler, *_FLAGS, "-shared", "-o", str(linked), *objects], compiler)
    return linked


def _run(command: list[str], compiler: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as err:
        raise KernelUnavailableError(f"the compiler {compiler} cannot be run: {err}") from err
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr[:200].strip())
        raise KernelUnavailableError(f"the compiler {compiler} failed: {reason}", log=done.stderr)
    return done.stdout
