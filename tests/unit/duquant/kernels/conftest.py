"""Choosing backends and instruction sets for one test."""

from collections.abc import Iterator

import pytest

from duquant.kernels import dispatch
from duquant.kernels.cpu.library import library
from duquant.kernels.settings import CPU_ISA


def forget() -> None:
    library.cache_clear()
    dispatch.forget()


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Machine and settings are looked at again in this test, and after it."""
    forget()
    yield
    forget()


@pytest.fixture(params=["portable", "avx2", "vnni", "amx"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine has, in turn: lower ones are what older machines run."""
    with monkeypatch.context() as patch:
        patch.setenv(CPU_ISA, request.param)
        forget()
        if library().isa != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield request.param
    forget()
    library()  # the library keeps its last instruction set until it is started again
