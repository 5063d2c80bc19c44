"""Reads a batch's input: once for its size, digest and custom_ids, then line by line, never whole in memory."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagleray.deploy.batch.rows import Line, custom_id
from eagleray.deploy.cli.utf8 import BOM, check_utf8

BLANK, UNNAMED = 0, 1  # in place of a custom_id's digest
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of an input before it runs; eight bytes a line, and more only for ids that are there twice."""

    size: int
    sha256: str
    ids: "array[int]"  # of each line, from line 1 on: 64 bits of its custom_id's digest, BLANK or UNNAMED
    num_rows: int  # lines that are not blank
    repeated: frozenset[int]  # digests that occur more than once

    def id_at(self, number: int) -> int:
        """What stands in line `number`; BLANK if there is no such line."""
        return self.ids[number - 1] if 1 <= number <= len(self.ids) else BLANK


def digest(name: str | None) -> int:
    """64 bits of a custom_id's digest."""
    if name is None:
        return UNNAMED
    short = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return max(int.from_bytes(short, "little"), UNNAMED + 1)


def survey(file: Path) -> Survey:
    """Read all of `file` once. Raises `ValueError` if it cannot be read or has no row."""
    whole, size, ids = hashlib.sha256(), 0, array("Q")
    try:
        with file.open("rb", BUFFER_BYTES) as lines:
            for text in lines:
                if not size:
                    check_utf8(text, f"the input {file}")
                whole.update(text)
                size += len(text)
                row = text if ids else text.removeprefix(BOM)
                ids.append(digest(custom_id(row)) if row.strip() else BLANK)
    except OSError as error:
        raise ValueError(f"the input {file} cannot be read: {error.strerror}; name a file of rows") from error
    values, counts = np.unique(np.frombuffer(ids, np.uint64), return_counts=True)
    repeated = frozenset(int(value) for value in values[counts > 1]) - {BLANK, UNNAMED}
    if not (num_rows := len(ids) - ids.count(BLANK)):
        raise ValueError(f"the input {file} holds no row; give one JSON object a line")
    return Survey(size, whole.hexdigest(), ids, num_rows, repeated)


def read_lines(file: Path, known: Survey) -> Iterator[Line]:
    """All lines that are not blank, in order. Raises `ValueError` if they are no longer those of the survey."""
    first: dict[str, int] = {}  # line of each custom_id that may be there twice
    number = 0
    with file.open("rb", BUFFER_BYTES) as lines:
        for number, text in enumerate(lines, 1):
            if number == 1:
                text = text.removeprefix(BOM)
            blank = not text.strip()
            name = None if blank else custom_id(text)
            if known.id_at(number) != (BLANK if blank else digest(name)) or number > len(known.ids):
                raise _changed(file)
            if blank:
                continue
            original = first.setdefault(name, number) if name is not None and digest(name) in known.repeated else number
            yield Line(number, text, None if original == number else original)
    if number != len(known.ids):
        raise _changed(file)


def _changed(file: Path) -> ValueError:
    return ValueError(
        f"the input {file} changed while it was read; write inputs whole before the job starts, and begin again with "
        "another output"
    )
