"""Building transformers models, one at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_BUILDING = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold this around `from_pretrained` and `from_config`.

    While transformers builds a model it sets torch's default dtype, which the whole process has in common, and puts
    back what was there before. Of two threads that do so at once, the second puts back the first one's, for ever.
    """
    with _BUILDING:
        yield
