"""Decides which other sites' pages may read answers in a browser (CORS)."""

import re
from collections.abc import Sequence

from starlette.types import ASGIApp

ANY = "*"
ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#@\s,A-Z]+")  # as browsers write it; "null" is a file's


def check_origin(origin: str) -> None:
    """Raises `ValueError` for what no browser ever sends, and so would let nobody in."""
    if origin != ANY and ORIGIN.fullmatch(origin) is None:
        raise ValueError(
            f"{origin!r} is not an origin; give scheme, host and port in lower case and no path, such as "
            f"https://app.example.com, or {ANY} for any"
        )


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app` for pages of these origins, too; with none just `app`.

    A preflight is answered here, since browsers send it without a key. Every other request goes on to `app`, and the
    answer, be it an error or a stream, carries the headers that let the page read it. Cookies are never asked for:
    keys are bearer tokens, which a page must have of its own.
    """
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware  # late: the command line reads options only

    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )
