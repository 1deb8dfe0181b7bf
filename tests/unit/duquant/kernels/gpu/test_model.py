"""A whole model on the GPU kernels: what the modules hand them, and what the packed cache does to them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from duquant.config import Recipe, TransformConfig
from duquant.inference import load
from duquant.kernels import dispatch
from duquant.kernels.gpu import GpuBackend
from duquant.kernels.reference import ReferenceBackend
from duquant.pipeline import QuantizeSummary


class InterpretedBackend(GpuBackend):
    """The GPU backend, taken on a CPU, too: Triton interprets its kernels there."""

    def require(self, device: torch.device) -> str:
        return f"kernels on {device}"


@pytest.fixture
def use_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def use(*backends: object) -> None:
        monkeypatch.setattr(dispatch, "backends", lambda: backends)
        dispatch.forget()

    yield use
    monkeypatch.undo()
    dispatch.forget()


@torch.no_grad()
def test_prompt_and_next_token_agree_with_the_reference(
    tiny_artifact: Callable[..., QuantizeSummary],
    recipe: Recipe,
    use_backends: Callable[..., None],
    device: torch.device,
) -> None:
    # Without rotations, which the kernels make in bfloat16: in a random model, one code that falls to its neighbour
    # changes all that follows.
    artifact = tiny_artifact(with_recipe=replace(recipe, name="plain", transform=TransformConfig())).artifact
    tokens = torch.randint(3, 200, (1, 4), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for backends in ((ReferenceBackend(),), (InterpretedBackend(), ReferenceBackend())):
        use_backends(*backends)
        model = load(artifact, device=str(device))[0].to(torch.float32)
        prompt = model(tokens[:, :-1])
        following = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
        logits.append((prompt.logits, following.logits))
    (prompt_expected, next_expected), (prompt_found, next_found) = logits
    # Rounding and products give the same bits; a prompt's attention is torch's own, over the cache's states.
    assert torch.allclose(prompt_found, prompt_expected, rtol=1e-3, atol=1e-3)
    # The next token's is our kernel's: products of float16.
    assert float((next_found - next_expected).norm() / next_expected.norm()) < 0.02
