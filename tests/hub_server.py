"""A Hub on 127.0.0.1 that speaks as much of the protocol as pushing and loading need; it keeps files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub:
    """What the server keeps, and how it answers.

    Attributes:
        files: repository → path → content.
        commits: paths of each commit, in order.
        status: an HTTP status to answer every request with, or None.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[list[str]] = []
        self.status: int | None = None
        self.url = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.status is not None:
                return self.answer(hub.status, {"error": "refused by the test"})
            parts = self.path.split("?")[0].strip("/").split("/")
            if self.path == "/api/repos/create":
                name = json.loads(body)["name"]
                repository = f"{json.loads(body).get('organization') or 'tester'}/{name}"
                hub.files.setdefault(repository, {})
                return self.answer(200, {"url": f"{hub.url}/{repository}", "name": repository})
            if self.path == "/api/validate-yaml":  # the card's metadata
                return self.answer(200, {"errors": [], "warnings": []})
            repository = "/".join(parts[2:4])
            if parts[4] == "preupload":
                paths = [entry["path"] for entry in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self.answer(200, {"files": files})
            assert parts[4] == "commit", self.path
            entries = [json.loads(line) for line in body.splitlines()]
            changed = {
                e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"
            }
            hub.files[repository].update(changed)
            hub.commits.append(sorted(changed))
            self.answer(200, {"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_GET(self) -> None:
            if hub.status is not None:
                return self.answer(hub.status, {"error": "refused by the test"})
            path = self.path.split("?")[0].strip("/")
            if path.startswith("api/whoami"):
                return self.answer(200, {"type": "user", "name": "tester", "orgs": []})
            if path.startswith("api/models/"):
                repository = "/".join(path.split("/")[2:4])
                if "/tree/" in path:
                    folder = path.partition("/tree/")[2].partition("/")[2]
                    names = [name for name in hub.files.get(repository, {}) if name.startswith(folder)]
                    return self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names])
                siblings = [{"rfilename": name} for name in hub.files.get(repository, {})]
                return self.answer(200, {"id": repository, "sha": COMMIT, "siblings": siblings})
            parts = path.split("/")  # owner, name, "resolve", revision, path
            content = hub.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            etag = hashlib.sha256(content).hexdigest()
            self.answer(
                200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
            )

        do_HEAD = do_GET

        def log_message(self, *values: Any) -> None:
            pass

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server; it stops when the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
