"""Where the GPU backend runs, and the whole path through it."""

from importlib.util import find_spec

import pytest
import torch

from duquant.config import ActivationConfig, WeightConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels import PackedWeight
from duquant.kernels.gpu import GpuBackend
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import quantize_weight
from duquant.transforms.site import SiteTransform


def test_a_cpu_is_refused_in_words() -> None:
    with pytest.raises(KernelUnavailableError, match="do not run on cpu"):
        GpuBackend().require(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_said() -> None:
    with pytest.raises(KernelUnavailableError, match="no CUDA device"):
        GpuBackend().require(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_a_gpu_its_name_is_said() -> None:
    assert torch.cuda.get_device_name() in GpuBackend().require(torch.device("cuda"))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_linear_layer_runs_through_the_backend(device: torch.device) -> None:
    backend = GpuBackend()
    weights, exact = [], []
    for seed, rows in enumerate((24, 8)):
        W = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
        q = quantize_weight(W, WeightConfig())
        weights.append(
            PackedWeight(pack(q.codes, bits=4).to(device), q.scale.to(device), q.zero_point.to(device), 64, 4)
        )
        exact.append((q.codes.double() - q.zero_point.double()) * q.scale.double())
    joined = backend.prepare_weight(weights)
    assert joined.splits == (24, 8)
    assert torch.equal(backend.restore_weight(joined), torch.cat([weight.packed for weight in weights]))
    prepared = backend.prepare_transform(SiteTransform(), ActivationConfig(), torch.ones(2, device=device))
    X = backend.transform_quantize_pack(torch.randn(3, 64, device=device), prepared)
    Y = backend.int4_linear(X, joined, None, torch.float32)
    values = ((X.codes.double() - X.zero_point.double()) * X.scale.double()).cpu()
    expected = values @ torch.cat(exact).T
    # The bracket is exact; three float32 roundings follow.
    assert bool(
        ((Y.double().cpu() - expected).abs() <= 4 * torch.finfo(torch.float32).eps * expected.abs() + 1e-12).all()
    )
