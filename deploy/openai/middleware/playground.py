"""Serves a page at `/` for talking with the model. It needs no API key itself; what is asked from it does."""

from importlib.resources import files

from starlette.types import ASGIApp, Receive, Scope, Send

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
        self._page = files("eagleray.deploy.openai.middleware").joinpath("playground.html").read_bytes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _is_root(scope):
            await self._app(scope, receive, send)
            return
        length = (b"content-length", str(len(self._page)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
        await send({"type": "http.response.body", "body": self._page if scope["method"] == "GET" else b""})


def _is_root(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) in ("", "/")
