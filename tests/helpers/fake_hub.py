"""A hub on loopback: the few routes that `huggingface_hub` calls to make a repository, commit to it and download it.

Files of weights are in large file storage, as on the hub, which says their size and hash.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


COMMIT = "c0ffee" + 34 * "0"


class FakeHub(ThreadingHTTPServer):
    """Holds one repository's files in memory.

    Attributes:
        files: content by name, once a commit has named them.
        created: what `create_repo` asked for, call by call.
        authorizations: the header of every request.
        commits: summary and parent of every commit.
        status: an HTTP status with which everything is refused; `None`: nothing is.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.commits: list[dict] = []
        self.requests: list[str] = []
        self.authorizations: set[str | None] = set()
        self.status: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def online_environment(hub: FakeHub, folder: Path, token: str) -> dict[str, str]:
    """Environment of a process that has this hub and no other, and keeps in `folder` what it downloads."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
    }


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: dict | list | bytes = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self) -> tuple[str, bytes]:
        """The path and the body of a request."""
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.server.authorizations.add(self.headers.get("Authorization"))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return path, body
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = self.begin()
        if self.server.status is not None:
            self.answer({"error": "no"}, self.server.status)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {**file, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": found})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{self.server.endpoint}/user/tiny/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": f"no route {path}"}, 404)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value)
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]

    def do_PUT(self) -> None:
        path, body = self.begin()
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(b"not what was announced", 400)
            return
        self.server.large[oid] = body
        self.answer()

    def do_GET(self) -> None:
        path, _ = self.begin()
        _, _, name = path.partition(f"/resolve/{COMMIT}/")
        if "/tree/" in path:
            self.answer([{"type": "file", "path": name, **self.facts(name)} for name in sorted(self.server.files)])
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name, **self.facts(name)} for name in sorted(self.server.files)]
            self.answer({"id": "user/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif name in self.server.files:
            etag = hashlib.sha256(self.server.files[name]).hexdigest()
            self.answer(self.server.files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def facts(self, name: str) -> dict:
        content = self.server.files[name]
        facts = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"size": len(content), "oid": digest, "sha256": digest, "pointerSize": 134}
        return facts
