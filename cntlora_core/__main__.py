"""`python -m cntlora_core`."""

import os
import sys

from .cli.main import main


def run() -> None:
    """The command as a process of its own: it ends with the command's exit status."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are written and closed. Unloading torch's libraries one by one would take half a
    # second and, with those for CUDA, 130 MB more than the whole run had needed.
    os._exit(status)


if __name__ == "__main__":
    run()
