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
from urllib.parse import parse_qs, urlsplit

COMMIT = "0" * 39 + "1"
#: instead of a status: the connection is closed without an answer
CUT = 0


class Hub:
    """What the server keeps, and how it answers.

    Attributes:
        files: repository → path → content, of the main branch; the name of a data set begins with datasets/.
        branches: the same of each other branch, by (repository, branch).
        commits: paths of each commit, in order.
        large: contents that were uploaded by themselves (LFS), by their SHA-256.
        uploads: how often such a content came.
        faults: what the next requests get instead of an answer: words that must be in "METHOD path", an HTTP status or
            `CUT`, and how often.
        requests: "METHOD path" of every request, and the token that came with it.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: list[list[str]] = []
        self.large: dict[str, bytes] = {}
        self.uploads = 0
        self.faults: list[tuple[str, int, int]] = []
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def fault(self, request: str) -> int | None:
        """The status that a request gets instead of an answer, if any."""
        for number, (words, status, times) in enumerate(self.faults):
            if words in request and times:
                self.faults[number] = (words, status, times - 1)
                return status
        return None


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

        def refused(self) -> bool:
            """Whether this request is one that goes wrong."""
            request = f"{self.command} {self.path}"
            hub.requests.append((request, self.headers.get("Authorization", "")))
            status = hub.fault(request)
            if status == CUT:
                self.close_connection = True
                self.connection.close()
            elif status is not None:
                self.answer(status, {"error": "refused by the test"}, {"Retry-After": "0"})
            return status is not None

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.refused():
                return
            place = urlsplit(self.path)
            parts = place.path.strip("/").split("/")
            if place.path == "/api/repos/create":
                name = json.loads(body)["name"]
                repository = f"{json.loads(body).get('organization') or 'tester'}/{name}"
                hub.files.setdefault(repository, {})
                self.answer(200, {"url": f"{hub.url}/{repository}", "name": repository})
            elif place.path == "/api/validate-yaml":  # the card's metadata
                self.answer(200, {"errors": [], "warnings": []})
            elif place.path.endswith("/info/lfs/objects/batch"):
                objects = [self.upload_of(entry) for entry in json.loads(body)["objects"]]
                self.answer(200, {"transfer": "basic", "objects": objects})
            elif parts[4] == "preupload":
                paths = [entry["path"] for entry in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                files = [
                    {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                    for path in paths
                ]
                self.answer(200, {"files": files})
            elif parts[4] == "branch":
                repository = "/".join(parts[2:4])
                hub.branches.setdefault((repository, parts[5]), dict(hub.files[repository]))
                self.answer(200, {})
            else:
                assert parts[4] == "commit", self.path
                self.commit("/".join(parts[2:4]), parts[5], body, "create_pr" in parse_qs(place.query))

        def upload_of(self, entry: dict[str, Any]) -> dict[str, Any]:
            known = entry["oid"] in hub.large
            actions = {} if known else {"actions": {"upload": {"href": f"{hub.url}/large/{entry['oid']}"}}}
            return {"oid": entry["oid"], "size": entry["size"], **actions}

        def commit(self, repository: str, branch: str, body: bytes, proposed: bool) -> None:
            changed = {}
            files = hub.files[repository] if branch == "main" else hub.branches[repository, branch]
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "deletedFolder":
                    assert any(path.startswith(entry["value"]["path"]) for path in files)
                    for path in [path for path in files if path.startswith(entry["value"]["path"])]:
                        del files[path]
                if entry["key"] == "file":
                    changed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    changed[entry["value"]["path"]] = hub.large[entry["value"]["oid"]]
            if proposed:
                files = hub.branches.setdefault((repository, "refs/pr/1"), {})
            files.update(changed)
            hub.commits.append(sorted(changed))
            answer = {"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
            proposal = {"pullRequestUrl": f"{hub.url}/{repository}/discussions/1"} if proposed else {}
            self.answer(200, answer | proposal)

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.refused():
                return
            name = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == name
            hub.large[name] = content
            hub.uploads += 1
            self.answer(200)

        def do_GET(self) -> None:
            if self.refused():
                return
            path = urlsplit(self.path).path.strip("/")
            if path.startswith("api/whoami"):
                return self.answer(200, {"type": "user", "name": "tester", "orgs": []})
            if path.startswith(("api/models/", "api/datasets/")):
                kind, owner, name = path.split("/")[1:4]
                repository = f"{owner}/{name}" if kind == "models" else f"datasets/{owner}/{name}"
                if repository not in hub.files:
                    return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                if "/tree/" in path:
                    folder = path.partition("/tree/")[2].partition("/")[2]
                    names = [name for name in hub.files[repository] if name.startswith(folder)]
                    return self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names])
                siblings = [{"rfilename": name} for name in hub.files[repository]]
                return self.answer(200, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
            place, _, file = path.partition("/resolve/")  # owner/name, before it perhaps datasets/; revision/path
            content = hub.files.get(place, {}).get(file.partition("/")[2])
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
