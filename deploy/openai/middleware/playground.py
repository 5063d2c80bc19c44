"""Serves a page at `/` for talking with the model. It needs no API key itself; what is asked from it does."""

import re
from importlib.resources import files

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.deploy.openai.field_types import MAX_EXACT, SAMPLING

NUMBER = re.compile(r'<input name="(\w+)" type="number"')  # an option of `SamplingParams`
HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (
        b"content-security-policy",  # only this page's own code, and nobody but this server is asked
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        b"img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
]


class Playground:
    """Answers GET and HEAD of `/`, wherever the application is mounted, with the page; `app` has all the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        text = files("eagleray.deploy.openai.middleware").joinpath("playground.html").read_text("utf-8")
        self._page = NUMBER.sub(_with_bounds, text).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _is_root(scope):
            await self._app(scope, receive, send)
            return
        length = (b"content-length", str(len(self._page)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
        await send({"type": "http.response.body", "body": self._page if scope["method"] == "GET" else b""})


def _with_bounds(field: re.Match[str]) -> str:
    """A number's field with what may be given there. HTML cannot leave out a bound itself; then the server says so."""
    option = SAMPLING[field[1]]
    assert option.bounds is not None
    low, high = max(option.bounds[0], -MAX_EXACT), min(option.bounds[1], MAX_EXACT)
    return f'{field[0]} min="{low}" max="{high}" step="{1 if option.kind == "int" else "any"}"'


def _is_root(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) in ("", "/")
