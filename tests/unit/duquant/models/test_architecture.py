"""Adapters: sites and the linears that are left out."""

import pytest

from duquant.errors import UnsupportedModelError
from duquant.models.architecture import ARCHITECTURES, LLAMA, architecture_of

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_supported_model_has_an_adapter(model_type: str) -> None:
    assert architecture_of({**CONFIG, "model_type": model_type}) is ARCHITECTURES[model_type]


def test_every_linear_belongs_to_one_site() -> None:
    assert len(LLAMA.linears) == len(set(LLAMA.linears)) == 7


def test_nothing_is_left_out_by_default() -> None:
    assert LLAMA.kept_sites(()) == LLAMA.sites


@pytest.mark.parametrize("site", LLAMA.sites, ids=lambda site: site.name)
def test_whole_site_can_be_left_out(site) -> None:  # type: ignore[no-untyped-def]
    kept = LLAMA.kept_sites(site.linears)
    assert site not in kept
    assert len(kept) == 3


def test_everything_can_be_left_out() -> None:
    assert LLAMA.kept_sites(LLAMA.linears) == ()


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_part_of_a_site_cannot_be_left_out(linear: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"leaves out {linear} but not the rest of site"):
        LLAMA.kept_sites((linear,))


def test_unknown_linear_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"skip_linears names 'mlp\.fc1'; .*mlp\.down_proj"):
        LLAMA.kept_sites(("mlp.fc1",))
