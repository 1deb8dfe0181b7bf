"""Settings of a service that is started as a process of its own."""

import os
from pathlib import Path
from typing import Any

_SECRETS = {"S3_ACCESS_KEY": "access-key-1", "S3_SECRET_KEY": "secret-canary-1", "KEY_PEPPER": "pepper-canary-1"}


def service_environment(home: Path, **values: Any) -> dict[str, str]:
    """Return the variables of a service in this folder; its object store answers nobody, its secrets say `canary`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DUQUANT_")}
    given = {"HOME": home, "S3_ENDPOINT": "http://127.0.0.1:9", **_SECRETS, **values}
    return plain | {f"DUQUANT_{name}": str(value) for name, value in given.items() if value is not None}
