"""Compiling on first use: one library for many processes, and a clear word where it cannot be had."""

import ctypes
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from duquant.errors import ConfigError, KernelUnavailableError
from duquant.kernels import describe, dispatch, prepare_weight
from duquant.kernels.cpu import build
from duquant.kernels.cpu.library import library
from duquant.kernels.onednn import OneDnnBackend
from duquant.kernels.settings import BACKENDS, CACHE, CPU_ISA
from duquant.kernels.types import PackedWeight

TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, and a cache of its own."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_PORTABLE", (build._Unit("tiny.cpp", flags=("-fvisibility=default",)),))
    monkeypatch.setattr(build, "_X86", ())
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return sources


def weight() -> PackedWeight:
    return PackedWeight(torch.zeros(3, 8, dtype=torch.int32), torch.ones(3, 1), torch.zeros(3, 1), 64, 4)


def test_library_is_compiled_once_and_found_again(tiny: Path) -> None:
    path = build.library_path()
    assert ctypes.CDLL(str(path)).answer() == 42
    before = path.stat().st_mtime_ns
    assert build.library_path() == path
    assert path.stat().st_mtime_ns == before


def test_changed_source_is_another_library(tiny: Path) -> None:
    first = build.library_path()
    (tiny / "tiny.cpp").write_text(TINY.replace("42", "43"))
    second = build.library_path()
    assert first != second
    assert ctypes.CDLL(str(second)).answer() == 43
    assert first.exists()


def test_many_at_once_make_one_library(tiny: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: build.library_path(), range(8)))
    assert len(paths) == 1
    left = [path.name for path in paths.pop().parent.iterdir()]
    assert sorted(Path(name).suffix for name in left) == [".lock", ".so"]


def test_unknown_instruction_set_of_an_old_compiler_is_left_out(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = build._Unit("tiny.cpp", "FUTURE", ("-mno-such-instructions",))
    monkeypatch.setattr(build, "_X86", (unit,))
    assert ctypes.CDLL(str(build.library_path())).answer() == 42


def test_source_that_does_not_compile_says_why(tiny: Path) -> None:
    (tiny / "tiny.cpp").write_text("int broken(\n")
    with pytest.raises(KernelUnavailableError, match=r"compiler .* failed: .*error"):
        build.library_path()


def test_no_compiler_is_said_and_onednn_is_taken(
    fresh_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, "duquant"):
        assert isinstance(prepare_weight([weight()]).backend, OneDnnBackend)
        assert isinstance(prepare_weight([weight()]).backend, OneDnnBackend)
        dispatch.forget()
        prepare_weight([weight()])
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the cpu kernels are not used here: no C++ compiler on this machine (looked for c++, g++, clang++)"]
    row = next(row for row in describe() if row["backend"] == "cpu")
    assert not row["available"]
    assert "no C++ compiler" in row["reason"]


def test_without_compiler_and_onednn_the_reference_is_taken(
    fresh_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, "duquant"):
        assert prepare_weight([weight()]).backend.name == "reference"
    assert caplog.records[1].getMessage() == (
        "the onednn kernels are not used here: this torch is built without oneDNN"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written_is_said(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv(CACHE, str(closed))
    with pytest.raises(KernelUnavailableError, match="cannot be written"):
        build.library_path()


def test_cache_that_is_a_file_is_said(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(KernelUnavailableError, match="cannot be written"):
        build.library_path()


def test_library_that_cannot_be_loaded_is_said(
    fresh_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.so").write_text("no library")
    monkeypatch.setattr("duquant.kernels.cpu.library.library_path", lambda: tmp_path / "kernels.so")
    with pytest.raises(KernelUnavailableError, match="cannot be loaded"):
        library()


def test_backends_can_be_chosen(fresh_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKENDS, "reference")
    assert prepare_weight([weight()]).backend.name == "reference"
    row = next(row for row in describe() if row["backend"] == "cpu")
    assert (row["available"], row["reason"]) == (False, f"left out by {BACKENDS}")
    monkeypatch.setenv(BACKENDS, "fpga")
    dispatch.forget()
    with pytest.raises(ConfigError, match="fpga"):
        prepare_weight([weight()])


def test_unknown_instruction_set_is_refused(fresh_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_ISA, "mmx")
    with pytest.raises(ConfigError, match="must be one of: portable, avx2, vnni, amx"):
        library()


def test_description_names_the_instruction_set(isa: str) -> None:
    row = next(row for row in describe() if row["backend"] == "cpu")
    assert row["available"]
    assert f"instruction set {isa} " in row["reason"]
