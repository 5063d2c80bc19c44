"""A directory of one's own for a socket, and an end to those of processes that were killed."""

import os
import shutil
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "eagleray-"
NAME = "hub"
YOUNG_S = 60.0  # a directory's owner may still be on its way to listen there


def make_socket_directory() -> Path:
    """A new directory that only this user can open, for one socket named `NAME`.

    Removes those of this user that were left behind.
    """
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_left_behind(directory):
            shutil.rmtree(directory, ignore_errors=True)  # another process may do the same
    return Path(tempfile.mkdtemp(prefix=PREFIX))


def _is_left_behind(directory: Path) -> bool:
    """Whether it is ours, has been there for a while, and holds a socket, and only that, on which nobody listens.

    The kernel answers for whoever listens, however busy or stopped. It refuses once the process is gone.
    """
    try:
        about = directory.lstat()
        mine = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
        if not mine or time.time() - about.st_mtime < YOUNG_S or os.listdir(directory) != [NAME]:
            return False
        with socket.socket(socket.AF_UNIX) as probe, suppress(BlockingIOError):
            probe.setblocking(False)
            probe.connect(str(directory / NAME))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
