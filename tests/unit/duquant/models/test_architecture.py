"""Adapters: sites and the linears that are left out."""

from typing import Any

import pytest

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.families import FAMILIES, architecture_of
from duquant.models.families.llama import LLAMA

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "num_local_experts": 3,
}


def adapter(model_type: str, **changes: Any) -> Any:
    return architecture_of({**CONFIG, "model_type": model_type, **changes})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_belongs_to_one_site(model_type: str) -> None:
    architecture = adapter(model_type)
    linears = architecture.linears_of(0)
    assert len(linears) == len(set(linears))
    assert [site.name for site in architecture.sites] == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert architecture.kept_sites((), 0) == architecture.sites


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_part_the_linears_of_a_site_evenly(model_type: str) -> None:
    for site in adapter(model_type).sites:
        assert tuple(linear for group in site.groups for linear in group) == site.linears
        assert len(site.groups) == site.experts
        assert len({len(group) for group in site.groups}) == 1


def test_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported: gemma3_text, llama, .*phi3"):
        adapter("gpt2")


@pytest.mark.parametrize("site", LLAMA.sites, ids=lambda site: site.name)
def test_whole_site_can_be_left_out(site: Any) -> None:
    kept = LLAMA.kept_sites(site.linears, 0)
    assert site not in kept
    assert len(kept) == 3


def test_everything_can_be_left_out() -> None:
    assert LLAMA.kept_sites(LLAMA.linears_of(0), 0) == ()


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_part_of_a_site_cannot_be_left_out(linear: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"leaves out {linear} but not the rest of site"):
        LLAMA.kept_sites((linear,), 0)


def test_unknown_linear_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"skip_linears names 'mlp\.fc1'; .*mlp\.down_proj"):
        LLAMA.kept_sites(("mlp.fc1",), 0)


def test_experts_are_left_out_by_a_pattern() -> None:
    architecture = adapter("mixtral")
    kept = architecture.kept_sites(("mlp.experts.*.down_proj",), 0)
    assert [site.name for site in kept] == ["attn_in", "attn_out", "mlp_in"]
    with pytest.raises(UnsupportedModelError, match="but not the rest of site mlp_out"):
        architecture.kept_sites(("mlp.experts.1.down_proj",), 0)


def test_number_of_experts_is_found_under_either_name() -> None:
    named = {name: value for name, value in CONFIG.items() if name != "num_local_experts"}
    assert architecture_of({**named, "model_type": "qwen3_moe", "num_experts": 7}).sites[2].experts == 7
    with pytest.raises(SourceError, match="num_experts is None"):
        architecture_of({**named, "model_type": "qwen3_moe"})


def test_a_message_does_not_list_hundreds_of_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="and 376 more") as caught:
        adapter("qwen3_moe", num_local_experts=128).kept_sites(("mlp.down_proj",), 0)
    assert len(str(caught.value)) < 1000


def test_dense_layers_among_sparse_ones_have_the_dense_sites() -> None:
    architecture = adapter("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    experts = [architecture.sites_of(layer)[3].experts for layer in range(4)]
    assert experts == [1, 3, 1, 1]
    # A name of either kind of layer is known in both.
    assert architecture.kept_sites(("mlp.down_proj",), 1) == architecture.sites
    assert len(architecture.kept_sites(("mlp.down_proj",), 0)) == 3


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("qwen3_moe", {"num_local_experts": 5000}, "num_local_experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("phi3", {"head_dim": 15}, "head_dim"),
        ("gemma3_text", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
    ids=str,
)
def test_absurd_config_is_named(model_type: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=f"config.json: {named} is"):
        adapter(model_type, **changes)


@pytest.mark.parametrize("name", ["use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma_that_would_compute_something_else_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name} is"):
        adapter("gemma3_text", **{name: 30.0})


def test_rows_of_a_fused_linear_begin_after_the_others() -> None:
    attn_out, mlp_out = adapter("phi3").sites[1::2]
    assert attn_out.fold.first_row == (4 + 2) * 16
    assert mlp_out.fold.first_row == 96


def test_mixtral_s_tensors_have_their_names_in_the_checkpoint() -> None:
    names = {
        "mlp.gate.weight": "block_sparse_moe.gate.weight",
        "mlp.experts.2.gate_proj.weight": "block_sparse_moe.experts.2.w1.weight",
        "mlp.experts.2.down_proj.weight": "block_sparse_moe.experts.2.w2.weight",
        "mlp.experts.2.up_proj.weight": "block_sparse_moe.experts.2.w3.weight",
        "self_attn.q_proj.weight": "self_attn.q_proj.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    }
    architecture = adapter("mixtral")
    assert {name: architecture.stored_name(name) for name in names} == names
