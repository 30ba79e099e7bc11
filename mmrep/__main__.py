"""``python -m mmrep`` is the `mmrep` command; torchrun starts it as ``-m mmrep``."""

import sys

from mmrep.cli import main

if __name__ == "__main__":  # not where a loader's worker that is spawned imports this
    sys.exit(main())
