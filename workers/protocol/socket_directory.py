"""Creates a private directory for a socket, and removes those of killed processes."""

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
MAX_PATH = 107  # bytes that a socket's address has room for
_RANDOM = 8  # characters that mkdtemp adds


def make_socket_directory() -> Path:
    """A new directory that only this user can open, for one socket named `NAME`.

    Removes those of this user that were left behind. Raises `ValueError` as `socket_place`.
    """
    remove_left_behind()
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=socket_place()))


def remove_left_behind(min_age_s: float = YOUNG_S) -> None:
    """Directories of this user's processes that were killed, as far as they have been there for so long."""
    for directory in socket_place().glob(f"{PREFIX}*"):
        if _is_left_behind(directory, min_age_s):
            shutil.rmtree(directory, ignore_errors=True)  # another process may do the same


def socket_place() -> Path:
    """Where such directories are made: with other temporary files, or in /tmp if that is too long for a socket.

    Raises `ValueError` if there is no such place.
    """
    usual = Path(tempfile.gettempdir())
    for place in (usual, Path("/tmp")):
        length = len(os.fsencode(place / PREFIX)) + _RANDOM + len(f"/{NAME}")
        if length <= MAX_PATH and os.access(place, os.W_OK | os.X_OK):
            return place
    raise ValueError(
        f"the directory for temporary files, {usual}, is too long for sockets, whose paths end after {MAX_PATH} bytes, "
        "and nothing can be written to /tmp; set a shorter TMPDIR"
    )


def _is_left_behind(directory: Path, min_age_s: float) -> bool:
    """Whether it is ours, has been there for a while, and holds a socket, and only that, on which nobody listens.

    The kernel answers for a process that listens, however busy or stopped. It refuses once the process is gone.
    """
    try:
        about = directory.lstat()
        mine = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
        if not mine or time.time() - about.st_mtime < min_age_s or os.listdir(directory) != [NAME]:
            return False
        with socket.socket(socket.AF_UNIX) as probe, suppress(BlockingIOError):
            probe.setblocking(False)
            probe.connect(str(directory / NAME))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
