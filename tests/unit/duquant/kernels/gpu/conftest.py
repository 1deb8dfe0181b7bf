"""Where the kernels run: on a GPU when there is one, else in Triton's interpreter on the CPU."""

from importlib.util import find_spec

import pytest
import torch

# Modules that import kernels cannot even be collected without Triton; test_backend.py says that it is missing.
collect_ignore = (
    []
    if find_spec("triton")
    else ["test_attention.py", "test_cache.py", "test_linear.py", "test_model.py", "test_transform.py"]
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    import triton

    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET has to be set before Triton is imported: tests/conftest.py"
    return torch.device("cpu")
