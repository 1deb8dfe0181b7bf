"""Tiny random models with a byte-level tokenizer: real checkpoints that take milliseconds."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")
VOCAB = 256 + len(SPECIAL)

# Small, and awkward where it can be: widths that are no power of two, heads that do not fill the hidden size.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    # Two layers, the first of which slides; one KV head wider than its share of the hidden size.
    "gemma3_text": {
        "head_dim": 24,
        "num_key_value_heads": 1,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "sliding_window": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 24, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give weights unit gain, gains and biases real work to do, and two norm channels an outlier."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
                if "layernorm" in name:
                    parameter[5], parameter[11] = 12.0, -8.0
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def make_tiny_model(
    path: Path, model_type: str = "llama", *, shard_size: str = "1GB", seed: int = 0, **changes: Any
) -> Path:
    """Write a random model of 2 layers and 64 channels into `path`, with its tokenizer; return `path`."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SIZES[model_type],
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    randomize(model, torch.Generator().manual_seed(seed))
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(path)
    return path


def tiny_text(lines: int = 60) -> str:
    """Return a text of about 80 bytes a line with some structure."""
    return "".join(
        f"Line {n}: the quick brown fox counts to {n * n} and jumps, {'again ' * (n % 4)}\n" for n in range(lines)
    )
