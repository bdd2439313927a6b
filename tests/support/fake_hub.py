"""A Hugging Face Hub on this machine's loopback: as much of its protocol as an upload needs.

Repositories are dicts of branches, branches dicts from path to content. Weights come by git-lfs, the rest within the
commit, as on the real one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    """One model repository."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: int = 0


@dataclass
class FakeHub:
    """The Hub's state.

    Attributes:
        url: its address.
        repositories: by name.
        requests: method and path of every request.
        fail: path pattern -> status to answer with instead.
        card_errors: what the check of a card's metadata says.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    card_errors: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.requests.append(f"{method} {path}")
        for pattern, status in self.fail.items():
            if re.search(pattern, path):
                return status, {"error": "as the test wants it"}
        if method == "PUT" and path.startswith("/store/"):
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            errors = [{"message": m} for m in self.card_errors]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if lfs := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            assert lfs[1] in self.repositories
            objects = json.loads(body)["objects"]
            places = [{"actions": {"upload": {"href": f"{self.url}/store/{o['oid']}"}}} for o in objects]
            return 200, {"objects": [o | place for o, place in zip(objects, places, strict=True)]}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path)
        if match is None:  # the client asks for things of its own
            return 404, {"error": "Not here"}
        if (repository := self.repositories.get(match[1])) is None:
            return 404, {"error": "Repository not found"}
        branch = unquote(match[3]) if match[3] else None
        match match[2]:
            case None:
                return 200, {"id": match[1], "private": repository.private, "tags": [], "downloads": 0, "likes": 0}
            case "branch":
                assert branch is not None
                if branch in repository.branches:
                    return 409, {"error": "Reference already exists"}
                repository.branches[branch] = dict(repository.branches["main"])
                return 200, {}
            case "tree":
                assert branch is not None
                files = repository.branches[branch]
                return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
            case "preupload":
                modes = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                return 200, {"files": modes}
            case "commit":
                assert branch is not None
                return self._commit(match[1], repository, branch, body)
        raise AssertionError(path)

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return 409, answer | {"error": "You already created this model repo"}
        self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return 200, answer

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> tuple[int, Any]:
        files = dict(repository.branches[branch])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.stored[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    files[value["path"]] = content
                case "deletedFile":
                    del files[value["path"]]
        repository.branches[branch] = files
        repository.commits += 1
        return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve one on a free port."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            status, data = hub.answer(self.command, path, body, self.headers.get("Authorization"))
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = _any  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
