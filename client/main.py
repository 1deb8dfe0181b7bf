"""The entry of `duquant`: everything else is imported inside, so that Ctrl-C is quiet from the first moment on."""

import sys
from collections.abc import Sequence

_INTERRUPTED = 130
"""`client.errors.EXIT_INTERRUPTED`, which may not have been imported yet."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Every error is one line on stderr."""
    try:
        from client.app import run_app

        return run_app(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    main()
