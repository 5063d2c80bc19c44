"""Writes results to a file so that whatever is written survives a kill of the job.

Results go to OUTPUT.partial, each in one write, and to the disk with every `sync`. OUTPUT.partial.json says of which
input and model they are. A job that starts again reads them, cuts off a last line that was torn, and goes on with the
others. The partial file is locked while a job runs, so that there is one job for an output.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from eagleray.deploy.batch.input import BLANK, Survey, digest
from eagleray.deploy.batch.rows import recorded

logger = logging.getLogger(__name__)


class Identity(msgspec.Struct, frozen=True):
    """What must be the same when a job goes on, or its results would not belong together."""

    input_bytes: int
    input_sha256: str
    model: str


@dataclass
class Done:
    """Which lines have their results already."""

    lines: bytearray  # 1 for each that has, from line 0, which there is not, on
    num_rows: int = 0
    num_failed: int = 0


class Journal:
    """The partial file, open and locked."""

    def __init__(self, partial: Path, identity: Identity) -> None:
        """Open it, or make it. Raises `ValueError` if another job has it, or if it belongs to another input."""
        self.partial = partial
        self._sidecar = sidecar(partial)
        self._file = _locked(partial)
        try:
            self._check(identity)
        except BaseException:
            self.close()
            raise

    def _check(self, identity: Identity) -> None:
        is_new = os.fstat(self._file).st_size == 0
        known = read_identity(self.partial)
        if known is None and not is_new:
            raise ValueError(
                f"{self.partial} is there, but no {self._sidecar.name} that says what it belongs to; "
                "move it away, or name another output"
            )
        if known is None or (is_new and known != identity):
            _write_whole(self._sidecar, msgspec.json.encode(identity))
        elif known != identity:
            raise ValueError(_differs(self.partial, known, identity))

    def recover(self, known: Survey) -> Done:
        """The lines that are done; cuts the file where its last whole line ends.

        Raises `ValueError` if a result does not belong to a line of the input, or to one that has a result already.
        """
        done = Done(bytearray(len(known.ids) + 1))
        end = 0
        for text in _whole_lines(self.partial):
            try:
                number, name, succeeded = recorded(text)
            except ValueError:  # what a machine left that lost power
                break
            at = known.id_at(number)
            if at == BLANK or at != digest(name) or done.lines[number]:
                raise ValueError(
                    f"{self.partial} has a result for line {number} with custom_id {name!r}, which the input has not "
                    "or which has one already: somebody else wrote there; move it away to begin anew"
                )
            done.lines[number] = 1
            done.num_rows += 1
            done.num_failed += not succeeded
            end += len(text)
        if (cut := os.fstat(self._file).st_size - end) > 0:
            logger.info("%s: cut off %d bytes of a result that was not written whole", self.partial.name, cut)
            os.ftruncate(self._file, end)
        return done

    def append(self, text: bytes) -> None:
        """Write one result. Raises `OSError` if the disk takes no more, after which this is closed."""
        try:
            while text:  # once, unless the disk is full
                text = text[os.write(self._file, text) :]
        except OSError as error:
            self.close()
            raise self._fault(error) from error
        except BaseException:
            self.close()
            raise

    def sync(self) -> None:
        """Wait until all that was written is on the disk. Raises `OSError` if it does not get there."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> OSError:
        """The same, saying what was done to which file."""
        what = f"{error.strerror}; results cannot be written, so the job stops: make room or fix the disk that holds"
        return OSError(error.errno, what, str(self.partial))

    def finish(self, publish: Callable[[Path], None]) -> None:
        """`publish` makes the output of the partial file, whole; then nothing is left of it."""
        self.sync()
        publish(self.partial)
        self._sidecar.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file, which stays for the next job unless there is nothing in it."""
        if self._file >= 0:
            if (
                os.fstat(self._file).st_size == 0
            ):  # nothing to go on with, and nothing that another input would mix with
                self._sidecar.unlink(missing_ok=True)
                self.partial.unlink(missing_ok=True)  # last, since its lock guards both
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sidecar(partial: Path) -> Path:
    """Where a partial file's identity is."""
    return partial.with_name(partial.name + ".json")


def read_identity(partial: Path) -> Identity | None:
    """What the partial file belongs to, if that is known. Raises `ValueError` for a file that is not one of ours."""
    file = sidecar(partial)
    try:
        return msgspec.json.decode(file.read_bytes(), type=Identity)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file} is not what a batch job writes ({error}); move it and {partial} away") from error


def sync_directory(directory: Path) -> None:
    """Wait until the names in it are on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(partial: Path) -> int:
    """The file's descriptor once it is ours. A file that its job renamed or removed meanwhile is no longer there."""
    while True:
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(os.fstat(file), partial.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"another job writes {partial} at this moment; wait for it or end it, or name another output"
            ) from None
        os.close(file)


def _whole_lines(partial: Path) -> Iterator[bytes]:
    with partial.open("rb") as lines:
        for text in lines:
            if text.endswith(b"\n"):
                yield text


def _write_whole(file: Path, content: bytes) -> None:
    """All of it or nothing, on the disk before this returns."""
    draft = file.with_name(file.name + ".new")
    with draft.open("wb") as writer:
        writer.write(content)
        writer.flush()
        os.fsync(writer.fileno())
    draft.replace(file)
    sync_directory(file.parent)


def _differs(partial: Path, known: Identity, given: Identity) -> str:
    names = [name for name in Identity.__struct_fields__ if getattr(known, name) != getattr(given, name)]
    what = ", ".join(f"{name} {getattr(known, name)!r} and not {getattr(given, name)!r}" for name in names)
    return (
        f"{partial} was begun with {what}; run it with the same input and model to go on, name another output, or "
        f"remove it to begin anew"
    )
