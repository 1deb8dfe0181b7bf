"""RMSNorm: one pass of the CPU's kernel, the definition in torch, and transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from duquant.errors import ShapeError
from duquant.kernels import dispatch, rms_norm
from duquant.kernels.settings import BACKENDS

EPS = torch.finfo(torch.float32).eps


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("channels", [1, 16, 33, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_has_the_bits_of_the_definition(
    isa: str, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, weight = rows(2, 9, channels).to(dtype), rows(channels, seed=1).to(dtype)
    X[0, 0] = 0
    ours = rms_norm(X, weight, 1e-5)
    monkeypatch.setenv(BACKENDS, "reference")
    dispatch.forget()
    assert torch.equal(ours, rms_norm(X, weight, 1e-5))
    dispatch.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_transformers_norm_but_for_the_order_of_a_sum(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    norm.weight.data = rows(576, seed=1).to(dtype)
    X = rows(40, 576).to(dtype)
    expected = norm(X).detach()
    # Two roundings of bfloat16 that may fall to the neighbour; in float32 those of a sum of 576 squares.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 576 * EPS
    torch.testing.assert_close(rms_norm(X, norm.weight.data, 1e-5), expected, rtol=tolerance, atol=0)


def test_rows_that_do_not_lie_next_to_each_other_are_read_in_order() -> None:
    X, weight = rows(6, 5, 64).bfloat16(), torch.ones(64).bfloat16()
    last = X[:, -1:]
    assert torch.equal(rms_norm(last, weight, 1e-5), rms_norm(last.contiguous(), weight, 1e-5))


def test_no_rows_give_none() -> None:
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)


@pytest.mark.parametrize(
    ("X", "weight"),
    [
        (torch.ones(2, 8), torch.ones(9)),
        (torch.ones(2, 8), torch.ones(8).bfloat16()),
        (torch.ones(2, 8).double(), torch.ones(8).double()),
    ],
)
def test_other_widths_and_dtypes_are_refused(X: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="one dtype, float32 or bfloat16, one width and one device"):
        rms_norm(X, weight, 1e-5)
