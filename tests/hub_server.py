"""A small Hub on loopback: enough of its HTTP API to look up, download, make and fill repositories."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
"""The one commit of every repository; `main` and `v1` point at it."""


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories in `root/models/org/name` and `root/datasets/org/name`; yield address and requests.

    What is committed to a branch is in `root/branches/BRANCH/org/name`. The organisation `closed` takes nothing.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"))
            else:
                self._resolve(path.removeprefix("/"))

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            else:
                kind, org, name, what, *rest = path.removeprefix("/api/").split("/")
                self._change(root / kind / org / name, what, rest[0] if rest else "", body)

        def _create(self, asked: dict[str, Any]) -> None:
            org, name = asked.get("organization") or "someone", asked["name"]
            if org == "closed":
                self._refuse("Forbidden", "You don't have the rights to create a model under this namespace", 403)
                return
            requests.append(f"private={asked.get('private', asked.get('visibility') == 'private')}")
            (root / "models" / org / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"http://{self.headers['Host']}/{org}/{name}", "name": f"{org}/{name}"})

        def _change(self, folder: Path, what: str, revision: str, body: str) -> None:
            if what == "paths-info":
                asked = json.loads(body)["paths"]
                self._json([_entry(folder, folder / p) for p in asked if (folder / p).is_file()])
            elif what == "branch":
                self._json({})
            elif what == "preupload":
                files = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                self._json({"files": files})
            elif what == "commit":
                if revision != "main":
                    folder = root / "branches" / revision / folder.parent.name / folder.name
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        file = folder / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                address = f"http://{self.headers['Host']}/{folder.parent.name}/{folder.name}"
                self._json({"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})

        def _api(self, path: str) -> None:
            kind, org, name, *rest = [*path.split("/"), "", ""]
            folder = root / kind / org / name
            rest = [part for part in rest if part]
            if not name or not folder.is_dir():
                self._refuse("RepoNotFound", "Repository not found")
            elif len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
                self._refuse("RevisionNotFound", f"Invalid rev id: {rest[1]}")
            elif rest[:1] == ["tree"]:
                inside = folder.joinpath(*rest[2:])
                self._json([_entry(folder, p) for p in sorted(inside.glob("*"))] if inside.is_dir() else [])
            else:
                files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
                self._json({"id": f"{org}/{name}", "sha": COMMIT, "siblings": files, "private": False})

        def _resolve(self, path: str) -> None:
            kind, path = ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path)
            org, name, _, _, *inside = path.split("/")
            file = root.joinpath(kind, org, name, *inside)
            if not file.is_file():
                self._refuse("EntryNotFound", "Entry not found")
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def _json(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _refuse(self, code: str, message: str, status: int = 404) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"type": "directory", "path": str(path.relative_to(folder)), "oid": COMMIT, "size": 0}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "oid": oid, "size": path.stat().st_size}
