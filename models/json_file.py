"""Small JSON files that a checkpoint may have."""

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no file. Raises `ValueError` that names the file and the remedy."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__} and no object; fetch the file again")
    return content
