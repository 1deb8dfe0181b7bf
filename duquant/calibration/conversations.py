"""Writes the text `builtin:conversations`: what a small chat model makes of both sides of a conversation.

    python -m duquant.calibration.conversations texts/conversations.txt      # a quarter of an hour on one core

The file is kept with the code, since another machine's sums would draw other words. Texts of help pages or of an
encyclopedia lack questions, advice and talk, of which much of what a model is used for consists; such texts of people
come with licences, or with the benchmarks that they were taken from. The model is SmolLM2-135M-Instruct (Apache 2.0),
so what is written is as good as one may expect of it: nothing in the text is to be believed. One coarse sentence was
taken out by hand.
"""

import argparse
import re
from pathlib import Path

import torch

from duquant.calibration.text import load_tokenizer
from duquant.calibration.written import DOCUMENT, beginning, write_documents
from duquant.models.references import resolve_model

_MODEL = "demo:smollm2-135m"
_COUNT = 128
_TEMPERATURE = 0.8
"""At 1, a model as small as this one loses the thread within some sentences."""
_SEED = 0
_TURN = re.compile(r"(<\|(im_start|im_end)\|>\s*(user\b|assistant\b|system\b)?\s*)+")
"""What ends a turn and begins the next one."""


def plain(document: str) -> str:
    """Return a conversation without the marks of the model's own template, which mean nothing to another one.

    >>> plain("Why?<|im_end|><|im_start|>assistant Because.<|im_end|>").split()
    ['Why?', 'Because.']
    """
    # The last token may be a part of a character.
    turns = _TURN.sub("\n\n", document).replace("\ufffd", "")
    return re.sub(r"\n\s*\n", "\n\n", turns).strip()


def write(path: Path) -> None:
    """Write the text."""
    model = resolve_model(_MODEL)
    tokenizer = load_tokenizer(model)
    start = beginning(tokenizer, None)
    generator = torch.Generator().manual_seed(_SEED)
    documents = write_documents(
        model, start, count=_COUNT, length=DOCUMENT, generator=generator, temperature=_TEMPERATURE
    )
    texts = [plain(tokenizer.decode(each[len(start) :])) for each in documents]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    write(parser.parse_args().path)
