"""What every client is tried with: a question, a second one after the answer, a stream. Needs nothing but Python."""

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

KEY = "none"
FIRST, SECOND = "Name a colour.", "And another?"
MAX_TOKENS = 12


@dataclass(frozen=True)
class Site:
    """Where the server is, and what it serves."""

    url: str  # with /v1
    model: str


def check(
    package: str,
    plain: Callable[[Site], object] | None,
    history: Callable[[Site], object] | None,
    streaming: Callable[[Site], object] | None,
) -> None:
    """Run all on the site that the command line names, and print one line of JSON about them.

    Each check returns what came, and has failed if that is nothing, or if it raises.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    site = Site(**vars(parser.parse_args()))
    found = {
        name: _try(work, site) for name, work in (("plain", plain), ("history", history), ("streaming", streaming))
    }
    print(json.dumps({"version": version(package), **found}))


def _try(work: Callable[[Site], object] | None, site: Site) -> str:
    if work is None:
        return "-"
    try:
        came = work(site)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:200]
    return "works" if came else "nothing came"
