"""Runs a program that ends with its parent: `python -m client.child PARENT_PID PROGRAM ...`.

`duquant up` starts its processes through this. On Linux the kernel sends the program SIGTERM when the parent dies,
however it dies; the setting survives exec, so nothing of this module stays in the program. Doing it here and not in a
preexec_fn keeps the parent free to have threads. Elsewhere the program simply runs, and only an orderly end of the
parent stops it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_ORPHANED = 1


def main() -> None:
    """Tie this process to its parent and become the program."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the kernel knew that we care
        sys.exit(_ORPHANED)
    os.execvp(command[0], command)  # noqa: S606  no shell is wanted


if __name__ == "__main__":
    main()
