"""Prints every option as Markdown: `python -m eagleray.deploy.reference`.

One table for each kind of options, made of what is said where they are declared, for the documentation to include.
"""

from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import SamplingParams

BAR = "\\|"  # within a cell


class Row(NamedTuple):
    """One option."""

    name: str
    type: str
    default: str  # as in Python; empty where the option must be given
    values: str  # which it takes, in words
    help: str


def rows_of(owner: type[Any]) -> Iterator[Row]:
    """The options of a dataclass (`cluster/options.py`), in order."""
    for option in options(owner).values():
        kind = f"{option.kind} | None" if option.optional else option.kind
        yield Row(option.name, kind, _default(option.default), option.values, option.text)


def server_rows() -> Iterator[Row]:
    """The options of a server beside its engine's."""
    from eagleray.deploy.serve.config import ServeArgs, own_names  # late: the other tables do not need it

    properties = ServeArgs.model_json_schema()["properties"]
    for name, field in ServeArgs.model_fields.items():
        if name in own_names():
            kind = field.annotation.__name__ if field.annotation in (bool, float, int) else str(field.annotation)
            kind = kind.replace("typing.", "").replace("pydantic.types.", "")
            yield Row(name, kind, _default(field.default), _limits(properties[name]), field.description or "")


def markdown(rows: Iterator[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield "| Option | Type | Default | Values | What it does |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        code = (text and f"`{text}`" for text in row[:3])
        words = (text.replace("*", "\\*") for text in row[3:])
        yield f"| {' | '.join(cell.replace('|', BAR) for cell in (*code, *words))} |"


def page() -> Iterator[str]:
    """The lines of the whole page."""
    yield from ("# Options", "", "Made by `python -m eagleray.deploy.reference`; edit the declarations instead.", "")
    yield from (
        "## Engine",
        "",
        "`LLM(...)`, `AsyncLLM(...)`, every command that starts an engine, a server's YAML.",
        "",
    )
    yield from markdown(rows_of(EngineConfig))
    yield from ("", "## Sampling", "", "`SamplingParams(...)`, `eagleray generate` and `chat`, requests over HTTP.", "")
    yield from markdown(rows_of(SamplingParams))
    yield from ("", "## Server", "", "`eagleray serve` and a server's YAML, beside the engine's.", "")
    yield from markdown(server_rows())


def _default(value: Any) -> str:
    return "" if value in (MISSING, PydanticUndefined) else value if isinstance(value, str) else repr(value)


def _limits(schema: dict[str, Any]) -> str:
    """Of a number, in words, or the choices that there are."""
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    limits = [f"{said} {schema[key]:g}" for key, said in words.items() if key in schema]
    return ", ".join([*schema.get("enum", ()), *limits])


if __name__ == "__main__":
    print("\n".join(page()))
