"""Text sources, tokenization and windows."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import AutoTokenizer

from duquant.calibration.builtin import builtin_text
from duquant.calibration.written import written_windows
from duquant.config import CalibrationConfig, TextSource
from duquant.errors import CalibrationError, ConfigError, SourceError

log = logging.getLogger(__name__)


def load_tokenizer(model_path: Path) -> Any:
    """Return the model's tokenizer.

    Raises:
        SourceError: the directory has no usable tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as err:
        raise SourceError(f"{model_path} has no tokenizer that transformers can read: {err}") from err


def read_text(source: TextSource, *, local_file: Path | None = None) -> str:
    """Return the text of a builtin, file, object or hub source.

    Args:
        source: what to read.
        local_file: where an `object` source was fetched to; also overrides a file's path.

    Raises:
        CalibrationError: the text is missing, unreadable or empty.
    """
    if source.kind == "builtin":
        text = builtin_text(source.name)
    elif source.kind == "hub":
        text = _read_hub(source)
    elif source.kind in ("file", "object"):
        if source.kind == "object" and local_file is None:
            raise CalibrationError(
                f"text object {source.name!r} was not fetched; object sources work through the service"
            )
        text = _read_file(local_file or Path(source.name).expanduser(), source.text_field)
    else:
        raise CalibrationError(f"a {source.kind} source has no text")
    if source.part != "all":
        middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
        text = text[:middle] if source.part == "calibration" else text[middle:]
    if not text.strip():
        raise CalibrationError(f"text source {source.kind}:{source.name} is empty")
    return text


def _read_file(path: Path, text_field: str) -> str:
    try:
        raw = path.read_text(encoding="utf-8")
    except OSError as err:
        raise CalibrationError(f"cannot read text file {path}: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise CalibrationError(f"text file {path} is not UTF-8 (byte {err.start})") from err
    if path.suffix not in (".jsonl", ".ndjson"):
        return raw
    documents = []
    # Not splitlines: characters such as U+2028 may stand inside a JSON string.
    for number, line in enumerate(raw.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)[text_field]
        except (ValueError, KeyError, TypeError) as err:
            raise CalibrationError(f"{path} line {number}: no JSON object with a text in field {text_field!r}") from err
        if not isinstance(document, str):
            raise CalibrationError(f"{path} line {number}: no JSON object with a text in field {text_field!r}")
        documents.append(document)
    return "\n\n".join(documents)


def _read_hub(source: TextSource) -> str:
    try:
        from datasets import load_dataset
    except ImportError as err:
        raise CalibrationError("hub text needs the package datasets: pip install 'duquant[hub]'") from err
    if Path(source.name).expanduser().exists():
        # The library would read it in the place of what is on the hub.
        raise CalibrationError(f"hub data set {source.name} is also a file or folder here; give its path as a file")
    try:
        rows = load_dataset(source.name, source.config, split=source.split)
        return "\n\n".join(rows[source.text_field])
    except Exception as err:  # as with models: errors of the HTTP library come through as they are
        raise CalibrationError(f"cannot read hub data set {source.name} ({source.split}): {err}") from err


def tokenize(tokenizer: Any, text: str) -> Int64[Tensor, " tokens"]:
    """Return the whole text's token ids, without special tokens."""
    # Fast tokenizers warn about texts longer than the model's context; the text is cut into windows right after.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def first_token(tokenizer: Any, *, starts_with_bos: bool) -> int | None:
    """Return the token that every window starts with, if the model's windows start with one.

    Raises:
        SourceError: they do, and the tokenizer has no BOS token.
    """
    if not starts_with_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise SourceError("the model needs every text to start with its BOS token, and the tokenizer has none")
    return int(tokenizer.bos_token_id)


def evenly_spaced_windows(
    tokens: Int64[Tensor, " tokens"], *, samples: int, seq_len: int, first: int | None = None
) -> Int64[Tensor, "samples seq_len"]:
    """Cut windows at even distances over the whole text; they overlap when the text is short.

    With a `first` token, each window is that token and seq_len - 1 tokens of the text.

    Raises:
        CalibrationError: the text has fewer tokens than one window.
    """
    total, length = tokens.shape[0], _text_length(seq_len, first)
    if total < length:
        raise CalibrationError(
            f"the calibration text has {total} tokens; one window of {seq_len} needs more text or a smaller seq_len"
        )
    if total < samples * length:
        log.warning("calibration windows overlap: %d tokens for %d windows of %d", total, samples, seq_len)
    last = total - length
    starts = [0] if samples == 1 else [last * i // (samples - 1) for i in range(samples)]
    return _start_with(first, torch.stack([tokens[start : start + length] for start in starts]))


def consecutive_windows(
    tokens: Int64[Tensor, " tokens"], *, seq_len: int, limit: int | None, first: int | None = None
) -> Int64[Tensor, "windows seq_len"]:
    """Cut consecutive, non-overlapping windows and drop the tail, as perplexity is measured in the literature.

    With a `first` token, each window is that token and seq_len - 1 tokens of the text, all of which are predicted.

    Raises:
        CalibrationError: the text has fewer tokens than one window.
        ConfigError: windows of that length or number predict nothing.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}; a window needs two tokens to predict one", field="seq_len")
    if limit is not None and limit < 1:
        raise ConfigError(f"windows is {limit}; it must be at least 1", field="windows")
    length = _text_length(seq_len, first)
    count = tokens.shape[0] // length
    if count == 0:
        raise CalibrationError(f"the text has {tokens.shape[0]} tokens; one window of {seq_len} needs more text")
    count = count if limit is None else min(count, limit)
    return _start_with(first, tokens[: count * length].view(count, length))


def _text_length(seq_len: int, first: int | None) -> int:
    return seq_len if first is None else seq_len - 1


def _start_with(first: int | None, text: Int64[Tensor, "windows length"]) -> Int64[Tensor, "windows seq_len"]:
    return text if first is None else torch.cat((text.new_full((text.shape[0], 1), first), text), dim=1)


def calibration_windows(
    model_path: Path,
    calibration: CalibrationConfig,
    *,
    seed: int,
    local_file: Path | None = None,
    starts_with_bos: bool = False,
) -> Int64[Tensor, "samples seq_len"]:
    """Return the token windows of a calibration, each with BOS first where the model needs that.

    Windows of one source lie together: those of `calibration.source` first, then what its shares say.

    Args:
        model_path: the model's directory.
        calibration: the sources, and how many windows of which length.
        seed: of what is drawn at random.
        local_file: where an `object` source was fetched to; also overrides a file's path.
        starts_with_bos: whether the model needs every text to start with its BOS token.

    Raises:
        CalibrationError: a text is missing, empty or too short.
        SourceError: the model has no usable tokenizer.
    """
    tokenizer = load_tokenizer(model_path)
    first = first_token(tokenizer, starts_with_bos=starts_with_bos)
    generator = torch.Generator().manual_seed(seed)
    seq_len, found = calibration.seq_len, []
    for source, samples in calibration.windows:
        if source.kind == "random":
            length = _text_length(seq_len, first)
            windows = torch.randint(0, len(tokenizer), (samples, length), generator=generator)
            found.append(_start_with(first, windows))
        elif source.kind == "self":
            found.append(
                written_windows(
                    model_path, tokenizer, samples=samples, seq_len=seq_len, first=first, generator=generator
                )
            )
        else:
            file = local_file if source == calibration.source else None
            tokens = tokenize(tokenizer, read_text(source, local_file=file))
            try:
                found.append(evenly_spaced_windows(tokens, samples=samples, seq_len=seq_len, first=first))
            except CalibrationError as err:
                raise CalibrationError(f"text source {source.kind}:{source.name}: {err}") from err
    return torch.cat(found)
