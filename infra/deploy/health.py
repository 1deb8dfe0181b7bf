"""`python -m infra.deploy.health URL [CHECK]`: exit status 0 when a part answers. For container health checks.

With CHECK, the answer is read as /readyz's and only that one of its checks counts.
"""

import json
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4


def is_healthy(url: str, check: str | None = None) -> bool:
    """Ask once."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310  the scheme is checked above
            body = answer.read()
    except urllib.error.HTTPError as error:
        if check is None:
            return False
        body = error.read()
    except OSError:
        return False
    if check is None:
        return True
    try:
        return bool(json.loads(body)["checks"][check]["ok"])
    except (ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(not is_healthy(*sys.argv[1:3]))
