"""How a command that builds shards answers: what it did, or one line of what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from data_prep.building.build_folder import InPlaceError
from mmrep.errors import MmrepError
from mmrep.printing import printable
from mmrep.stopping import Stopped, stopped_by_signals

GO_ON = "finished shards are kept, the same command goes on"


def answer(work: Callable[[], str]) -> int:
    """Do the work and print what it gives.

    Returns:
        The exit code: 0; 2 after an error that the user can mend; 128 + the number of a signal that ended it.
    """
    try:
        with stopped_by_signals():
            print(work())
    except InPlaceError as done:
        print(done)
    except MmrepError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {printable(error)}; {GO_ON}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped by {stop.name}; {GO_ON}", file=sys.stderr)
        return stop.exit_code
    return 0
