"""Fills pages of the site with what the program says itself, so that no page repeats it and grows old.

A comment in a page stands for a table: `<!-- options: generate/sampling -->` for a group of a command's options (or
`<!-- options: serve -->` for all of them), `<!-- server options -->` for `ServeArgs`, `<!-- results -->` for the
measurements in `tests/bench/results`, which become pages, too. Links to their files are made links to these pages.
"""

import argparse
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from eagleray.deploy.cli.arguments import Parser
from eagleray.deploy.cli.main import COMMANDS, _named
from eagleray.deploy.serve.config import ServeArgs, help_of, own_names

RESULTS = Path(__file__).parents[2] / "tests" / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Measurements become pages beside `benchmarks/index.md`, and their pictures and figures stand beside them."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put tables where comments ask for them, and links where they lead on the site."""
    markdown = re.sub(r"<!-- options: ([\w -]+)(?:/(\w+))? -->", lambda found: options(found[1], found[2]), markdown)
    markdown = markdown.replace("<!-- server options -->", server_options())
    return link_results(markdown.replace("<!-- results -->", results()), page.file.src_uri)


def options(command: str, wanted: str | None) -> str:
    """A table for each group of a command's options, or for one. Raises `KeyError` for what is not there."""
    parser = Parser(prog=f"eagleray {command}")
    _named(COMMANDS[command].add_arguments)(parser)
    groups = {str(group.title): group for group in parser._action_groups if group._group_actions}
    if wanted is not None:
        return _of_group(parser, groups[wanted])
    own = {title: group for title, group in groups.items() if title not in ("options", "positional arguments")}
    return "\n\n".join(f"**{title}**\n\n{_of_group(parser, group)}" for title, group in own.items())


def server_options() -> str:
    """A table of what a server has beside its engine."""
    return _table("option", [(f"`{name}`", help_of(name)) for name in ServeArgs.model_fields if name in own_names()])


def results() -> str:
    """A table of all measurements, the newest first."""
    rows = []
    for path in sorted(RESULTS.glob("*.md"), reverse=True):
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        title = re.sub(r", \d{4}-\d\d-\d\d$", "", title)
        rows.append((path.name[:10], f"[{title}]({path.name})"))
    return _table("date", rows, "what was measured")


def link_results(markdown: str, where: str) -> str:
    """Links of the page at `where` to files of measurements, which readers of the repository need, lead to pages."""

    def on_the_site(found: re.Match[str]) -> str:
        return f"]({posixpath.relpath(f'benchmarks/{found[1]}', posixpath.dirname(where))}"

    return re.sub(r"\]\((?:\.\./)+tests/bench/results/([^)#]+)", on_the_site, markdown)


def _of_group(parser: Parser, group: "argparse._ArgumentGroup") -> str:
    expand = parser._get_formatter()._expand_help
    return _table("option", [(_flags(action), expand(action)) for action in group._group_actions])


def _flags(action: argparse.Action) -> str:
    names = " ".join(f"`{name}`" for name in action.option_strings if not name.startswith("--no-"))
    return names or f"`{action.metavar or action.dest}`"


def _table(first: str, rows: list[tuple[str, str]], second: str = "meaning") -> str:
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    for name, text in rows:
        shown = text.replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
