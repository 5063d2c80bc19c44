"""A server that speaks as much of the Hugging Face hub's API as fetching a model needs, with faults on demand."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files of every commit, and the commit of every branch and tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # that is needed to get it, though everybody may know of it

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit, which is a branch's last from now on."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class HubServer:
    """`asked` has the method and path of every request; `status` is answered instead of anything else."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.status: int | None = None
        self.then: Callable[[], object] | None = None  # called once, after the first answer about a model
        self.cuts: dict[str, int] = {}  # name of a file -> how many more times its second half is not sent
        self.stalls_at: str | None = None  # name of a file of which half is sent, and no more
        self.stalled = threading.Event()  # it was
        self.ends = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=[0.01], daemon=True)

    def asked_for(self, word: str) -> int:
        """In how many requests that fetch something this stands."""
        return sum(word in line for line in self.asked if line.startswith("GET "))

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.ends.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    server.start()
    try:
        yield server
    finally:
        server.close()


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/agent-harnesses":  # which the library asks for its own sake
                return self._send(404, b"{}")
            server.asked.append(f"{self.command} {path}")
            if server.status is not None:
                return self._send(server.status, b"{}")
            if found := RESOLVE.fullmatch(path):
                return self._file(*found.groups())
            if found := API.fullmatch(path):
                return self._api(*found.groups())
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _api(self, name: str, what: str | None, revision: str | None) -> None:
            if (commit := self._commit(name, revision or "main")) is None:
                return
            files = server.repositories[name].commits[commit]
            if what == "tree":
                entries = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
                return self._send(200, json.dumps(entries).encode())
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            self._send(200, json.dumps(about).encode())
            if server.then is not None:
                server.then()
                server.then = None

        def _file(self, name: str, revision: str, path: str) -> None:
            if (commit := self._commit(name, revision)) is None:
                return
            repository = server.repositories[name]
            if repository.token is not None and self.headers.get("authorization") != f"Bearer {repository.token}":
                self._send(403 if "authorization" in self.headers else 401, b"{}", {"X-Error-Code": "GatedRepo"})
                return
            data = repository.commits[commit].get(path)
            headers = {"X-Repo-Commit": commit}
            if data is None:
                self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
                return
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            begin = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self._send(206 if begin else 200, data[begin:], headers, path)

        def _commit(self, name: str, revision: str) -> str | None:
            """None if there is none, which is said."""
            if (repository := server.repositories.get(name)) is None:
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return commit

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = "") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            half = body[: len(body) // 2]
            if file and file == server.stalls_at:
                self.wfile.write(half)
                server.stalled.set()
                server.ends.wait()
            elif file and server.cuts.get(file, 0):
                server.cuts[file] -= 1
                self.wfile.write(half)
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler
