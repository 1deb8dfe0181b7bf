"""Keys that were checked a moment ago: a client that sends many requests costs one look into the database a second."""

import hashlib
import threading
import time
from collections.abc import Awaitable, Callable

from cachetools import TTLCache

from infra.keys import ApiKey

_MOST_KEYS = 10_000


class KnownKeys:
    """Valid keys by their tokens' hashes, for some seconds.

    A key that expires is refused at once, and so is one that was revoked through this process; one that was revoked
    through another process works until what is known of it here is too old.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys: TTLCache[bytes, ApiKey] = TTLCache(_MOST_KEYS, seconds, clock)
        self._lock = threading.Lock()
        self._changes = 0

    async def get(self, token: str, look: Callable[[str], Awaitable[ApiKey | None]]) -> ApiKey | None:
        """Return the key of a token: as it is known, or as `look` finds it. None is not remembered."""
        digest = hashlib.sha256(token.encode()).digest()
        with self._lock:
            known = self._keys.get(digest)
            changes = self._changes
        if known is not None:
            return known
        found = await look(token)
        with self._lock:
            # What was found before a change may be what the change took away.
            if found is not None and changes == self._changes:
                self._keys[digest] = found
        return found

    def forget(self) -> None:
        """Look every key up again. Belongs behind every change of a key, when it is in the database."""
        with self._lock:
            self._changes += 1
            self._keys.clear()
