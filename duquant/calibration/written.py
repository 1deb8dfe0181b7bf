"""Text that a model writes itself."""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import AutoModelForCausalLM

from duquant.models.building import one_at_a_time

log = logging.getLogger(__name__)

DOCUMENT = 512
"""Tokens of a document."""
_DOCUMENTS_AT_ONCE = 64
_USER_TEXT = "DUQUANT-USER-TEXT"
"""Stands for what the user says, to find where a chat template puts it."""


def written_windows(
    model_path: Path, tokenizer: Any, *, samples: int, seq_len: int, first: int | None, generator: torch.Generator
) -> Int64[Tensor, "samples seq_len"]:
    """Fill windows with documents that the model writes at temperature 1.

    Many short ones: what a model writes stays with what it began with. This is the one source of calibration that
    needs the whole model in memory.

    Args:
        model_path: the model's directory.
        tokenizer: the model's.
        samples: windows.
        seq_len: tokens of a window.
        first: the token that every text of the model has to start with, if there is one.
        generator: of the draws.
    """
    start = beginning(tokenizer, first)
    length = max(min(DOCUMENT, seq_len), len(start))
    per_window = -(-seq_len // length)
    documents = write_documents(model_path, start, count=samples * per_window, length=length, generator=generator)
    return documents.view(samples, per_window * length)[:, :seq_len]


@torch.no_grad()
def write_documents(
    model_path: Path,
    start: list[int],
    *,
    count: int,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Int64[Tensor, "count length"]:
    """Return documents of `length` tokens that a model writes after the tokens `start`."""
    with one_at_a_time():
        model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=False, use_safetensors=True)
    model.eval()
    documents = []
    for done in range(0, count, _DOCUMENTS_AT_ONCE):
        ids = torch.tensor([start]).repeat(min(_DOCUMENTS_AT_ONCE, count - done), 1)
        step, cache = ids, None
        while ids.shape[1] < length:
            output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            likely = (output.logits[:, -1].float() / temperature).softmax(-1)
            step = torch.multinomial(likely, 1, generator=generator)
            ids = torch.cat((ids, step), dim=1)
        documents.append(ids)
    return torch.cat(documents)


def beginning(tokenizer: Any, first: int | None) -> list[int]:
    """Return the tokens that a document of the model's own begins with.

    A chat model is left alone where its template lets the user speak, so it asks the questions as well (Magpie, arXiv
    2406.08464).

    Args:
        tokenizer: the model's.
        first: the token that every text of the model has to start with, if there is one.
    """
    begin: list[int] = []
    if tokenizer.chat_template:
        try:
            turn = tokenizer.apply_chat_template([{"role": "user", "content": _USER_TEXT}], tokenize=False)
        except Exception as err:  # noqa: BLE001  a template is a program that came with the model
            log.warning("the chat template does not work, so documents begin without one: %s", err)
        else:
            before, found, _ = turn.partition(_USER_TEXT)
            begin = tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
    if not begin:
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        begin = [token or 0]
    return begin if first is None or begin[0] == first else [first, *begin]
