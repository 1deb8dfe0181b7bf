"""Calls about what jobs work on: models, recipes and texts."""

from pathlib import Path
from typing import Any

from client.calls.requests import Call, get, items, same, segment


def upload_text(path: Path, name: str | None = None) -> Call[Any]:
    """Upload a text to calibrate or measure on; the answer's `source` is what jobs name it by."""
    kind = "application/x-ndjson" if path.suffix in (".jsonl", ".ndjson") else "text/plain"
    headers = {"Content-Type": kind}
    return Call(
        method="POST", path="/v1/texts", read=same, params={"name": name or path.name}, file=path, headers=headers
    )


def list_texts(**filters: Any) -> Call[Any]:
    """Read a page of texts, newest first."""
    return get("/v1/texts", same, **filters)


def get_text(text_id: str) -> Call[Any]:
    """Read what is known of a text."""
    return get(f"/v1/texts/{_text(text_id)}", same)


def delete_text(text_id: str) -> Call[None]:
    """Delete a text."""
    return Call(method="DELETE", path=f"/v1/texts/{_text(text_id)}", read=same)


def _text(text_id: str) -> str:
    return segment(text_id, "text id", "text_0199a1b2...")


def list_recipes() -> Call[Any]:
    """Read the presets."""
    return get("/v1/recipes", items)


def list_models() -> Call[Any]:
    """Read the models that the service has."""
    return get("/v1/models", items)
