"""A small hub on the loopback interface, which speaks what huggingface_hub asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Hub:
    """Repositories by name; each has revisions, which are folders, and `main` is one of them.

    Attributes:
        gated: repositories whose files nobody gets; `broken`: those that the server fails at.
        asked: method and path of each request, without the query.
    """

    repositories: dict[str, dict[str, Path]]
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def downloads(self, kind: str = "") -> list[str]:
        """The files that were sent, each as often as it was."""
        paths = [path for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return sorted(path.rsplit("/", 1)[1] for path in paths if path.endswith(kind))


def commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def log_message(self, *args: Any) -> None:
            pass

        def _send(self, status: int, body: bytes, has_body: bool, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def _answer(self, has_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            if any(path.startswith(f"/api/models/{name}") for name in hub.broken):
                return self._send(500, b"", has_body)
            for name, revisions in hub.repositories.items():
                if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/"):
                    return self._describe(name, revisions, path, has_body)
                if path.startswith(f"/{name}/resolve/"):
                    revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                    if name in hub.gated:
                        return self._send(403, b"", has_body, X_Error_Code="GatedRepo")
                    return self._file(_folder(revisions, revision), file, has_body)
            return self._send(404, b"", has_body, X_Error_Code="RepoNotFound")

        def _describe(
            self, name: str, revisions: dict[str, Path], path: str, has_body: bool
        ) -> None:
            _, _, wanted = path.removeprefix(f"/api/models/{name}").partition("/")
            kind, _, revision = wanted.partition("/")
            folder = _folder(revisions, revision or "main")
            if folder is None:
                return self._send(404, b"", has_body, X_Error_Code="RevisionNotFound")
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
            data: Any = {
                "id": name,
                "sha": commit(folder),
                "siblings": [{"rfilename": n, "size": size} for n, size in names.items()],
            }
            if kind == "tree":
                data = [
                    {"type": "file", "path": n, "size": size, "oid": "0" * 40}
                    for n, size in names.items()
                ]
            return self._send(200, json.dumps(data).encode(), has_body)

        def _file(self, folder: Path | None, file: str, has_body: bool) -> None:
            if folder is None or not (folder / file).is_file():
                code = "RevisionNotFound" if folder is None else "EntryNotFound"
                return self._send(404, b"", has_body, X_Error_Code=code)
            body = (folder / file).read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            return self._send(200, body, has_body, ETag=tag, X_Repo_Commit=commit(folder))

    return Handler


def _folder(revisions: dict[str, Path], revision: str) -> Path | None:
    return revisions.get(revision) or {commit(path): path for path in revisions.values()}.get(
        revision
    )


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it for the length of the block; `hub.url` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path, *, offline: bool = False) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE say, which are read at an import."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
