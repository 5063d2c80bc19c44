"""Resets a process to nice 0, since Ray runs its workers at nice 15 by default."""

import os
from pathlib import Path


def run_at_normal_priority() -> int:
    """Take this process and all its threads to nice 0, where that is permitted; the niceness that it has then.

    In containers root may do so, other users usually not.
    """
    for thread in Path("/proc/self/task").iterdir():
        try:
            if os.getpriority(os.PRIO_PROCESS, int(thread.name)) > 0:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
        except PermissionError:
            break
        except ProcessLookupError:  # it has just ended
            continue
    return os.getpriority(os.PRIO_PROCESS, 0)
