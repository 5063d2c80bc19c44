"""Local files and object stores (through fsspec) as a batch's input and output.

An object can be neither appended to nor locked. So a job that writes to an object store keeps its journal in a local
work directory, uploads the output whole at the end, and fetches the input there, too. To go on after the machine is
gone, the work directory must be on a volume that outlasts it.
"""

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.deploy.batch.journal import sync_directory

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


@dataclass(frozen=True)
class Places:
    """`input` and `output` as they were given, and the partial file."""

    input: str
    output: str
    partial: Path

    @classmethod
    def of(cls, input: str, output: str, work_dir: Path | None) -> "Places":
        """Raises `ValueError` for an output in an object store without a work directory."""
        if is_remote(output) and work_dir is None:
            raise ValueError(
                f"the output {output} is in an object store, where nothing can be appended; name a directory on a disk "
                "that outlasts the job with --work-dir, where results are kept until the end"
            )
        folder = work_dir if work_dir is not None else Path(output).absolute().parent
        parents = [folder] if is_remote(output) else [folder, Path(output).absolute().parent]
        for parent in parents:
            if not parent.is_dir():
                raise ValueError(f"there is no directory {parent} to keep results in; create it")
        for place in (input, output):
            if is_remote(place):
                _open(place)  # what is missing is said before anything else is done
        return cls(input, output, folder / f"{_file_name(output, work_dir)}.partial")

    def fetch(self) -> Path:
        """The input as a local file; one in an object store is copied beside the partial file.

        Raises `ValueError` if it cannot be read.
        """
        if not is_remote(self.input):
            return Path(self.input)
        files, path = _open(self.input)
        try:
            with files.open(path, "rb") as source, self._copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except Exception as error:  # every file system has errors of its own
            raise ValueError(f"the input {self.input} cannot be read: {error or type(error).__name__}") from error
        return self._copy

    def output_exists(self) -> bool:
        """Whether something is there already."""
        if not is_remote(self.output):
            return Path(self.output).exists()
        files, path = _open(self.output)
        return bool(files.exists(path))

    def publish(self, partial: Path) -> None:
        """Make the output of the partial file: by a rename, or by an upload after which the file is removed.

        Raises `ValueError` if an object store refuses it.
        """
        if is_remote(self.output):
            files, path = _open(self.output)
            try:
                files.put_file(str(partial), path)
            except Exception as error:  # every file system has errors of its own
                raise ValueError(
                    f"the output {self.output} cannot be written: {error or type(error).__name__}; all results are in "
                    f"{partial}: fix this and run the same command again"
                ) from error
            partial.unlink()
            return
        folder = Path(self.output).absolute().parent
        try:
            partial.rename(self.output)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy_out(partial, folder)  # a work directory on another disk
        sync_directory(folder)
        if partial.parent != folder:
            sync_directory(partial.parent)

    def _copy_out(self, partial: Path, folder: Path) -> None:
        """The partial file goes once the output is on its disk, under its name: one of them is always there."""
        draft = folder / f"{partial.name}.new"
        try:
            shutil.copyfile(partial, draft)
            with draft.open("rb") as copied:
                os.fsync(copied.fileno())
            draft.rename(self.output)
            sync_directory(folder)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ValueError(
                f"the output {self.output} cannot be written: {error}; all results are in {partial}: fix this and run "
                "the same command again"
            ) from error
        partial.unlink()

    def clean(self) -> None:
        """Remove the copy of the input, if there is one."""
        self._copy.unlink(missing_ok=True)

    @property
    def _copy(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.input")


def is_remote(place: str) -> bool:
    """s3://bucket/key and the like; whatever fsspec knows."""
    return "://" in place


def _file_name(output: str, work_dir: Path | None) -> str:
    """In a work directory outputs of one name may meet."""
    name = os.path.basename(output)
    if work_dir is None:
        return name
    place = output if is_remote(output) else str(Path(output).absolute())
    return f"{hashlib.sha256(place.encode()).hexdigest()[:8]}-{name}"


def _open(place: str) -> tuple[Any, str]:
    """The file system of a place and its path there. Raises `ValueError` with what to install."""
    scheme = place.partition("://")[0]
    package = f"eagleray[{EXTRAS[scheme]}]" if scheme in EXTRAS else "fsspec"
    try:
        from fsspec.core import url_to_fs  # only those who name a URL need it

        files, path = url_to_fs(place)
    except ImportError as error:
        raise ValueError(f"{place} cannot be reached: {error}; run pip install '{package}'") from error
    except ValueError as error:
        raise ValueError(
            f"{place} cannot be reached: {error}; give a path, or a URL such as s3://bucket/key"
        ) from error
    return files, str(path)
