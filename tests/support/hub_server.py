"""A stand-in of the Hugging Face Hub on the loopback interface, as far as the real `huggingface_hub` client asks.

It keeps what arrives: regular files from the commit, large files through LFS (basic transfer). Nothing is mocked in
the client; it is told by `HF_ENDPOINT` where the Hub is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

USER, ACCESS_TOKEN = "someone", "hf_" + "Qz7" * 11
LARGE = (".safetensors", ".bin", ".png")  # what the Hub's attributes send through LFS


class Hub:
    """What the stand-in has been given: `files` path -> bytes, and every request as (method, path)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.commits: list[str] = []
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        # (a part of the path, the status to answer it with; 0 hangs up), and how often; -1 = always
        self.fail: tuple[str, int] | None = None
        self.failures = -1
        self.url = ""

    def environment(self) -> dict[str, str]:
        """Where the client finds it, and who asks."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": ACCESS_TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # another storage protocol, not needed for small files
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def faults_of_card(text: str) -> list[str]:
    """What the Hub's check of a card's metadata would object to, from its documented fields."""
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    if not isinstance(data, dict):
        return ["no metadata"]
    faults = [f"{name} must be a list of strings" for name in ("tags", "datasets") if not _strings(data.get(name, []))]
    for name in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if not isinstance(data.get(name, ""), str):
            faults.append(f"{name} must be a string")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            faults.append("model-index: name and results are required")
        for result in model.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                faults.append("model-index: task.type is required")
            if not all(isinstance(result.get("dataset", {}).get(name), str) for name in ("type", "name")):
                faults.append("model-index: dataset.type and dataset.name are required")
            for metric in result.get("metrics", [{}]):
                value = metric.get("value")
                if not isinstance(metric.get("type"), str) or not isinstance(value, int | float) or value != value:
                    faults.append(f"model-index: metric {metric}")
    return faults


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if hub.fail is not None and hub.fail[0] in path and hub.failures != 0:
            hub.failures -= 1
            if hub.fail[1] == 0:
                self.close_connection = True
                return None
            return self._send(hub.fail[1], {"error": f"made to fail with {hub.fail[1]}"})
        if path.startswith("/lfs/"):  # presigned: no token
            hub.objects[path.removeprefix("/lfs/")] = body
            return self._send(200, {})
        if path == "/api/validate-yaml":
            faults = faults_of_card(json.loads(body)["content"])
            errors = [{"message": fault} for fault in faults]
            return self._send(400 if faults else 200, {"errors": errors, "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {ACCESS_TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        route = next((name for pattern, name in _ROUTES if re.fullmatch(pattern, path)), None)
        if route is None:
            return self._send(404, {"error": f"the stand-in has no {self.command} {path}"})
        return getattr(self, route)(path, body)

    def _send(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    # ------------------------------------------------------------------------------------------------- routes

    def whoami(self, path: str, body: bytes) -> None:
        self._send(200, {"type": "user", "name": USER, "orgs": []})

    def create(self, path: str, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, asked)
        self._send(status, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def preupload(self, path: str, body: bytes) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._send(200, {"files": modes})

    def batch(self, path: str, body: bytes) -> None:
        objects = [
            {**item, "authenticated": True, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def commit(self, path: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.hub.files[value["path"]] = content
        number = f"{len(self.hub.commits):040x}"
        repo = "/".join(path.split("/")[3:5])
        answer = {"success": True, "commitOid": number, "commitUrl": f"{self.hub.url}/{repo}/commit/{number}"}
        self._send(200, {**answer, "hookOutput": "", "pullRequestUrl": None})

    def info(self, path: str, body: bytes) -> None:
        name = "/".join(path.split("/")[3:5])
        if name not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"})
        siblings = [{"rfilename": file} for file in sorted(self.hub.files)]
        return self._send(200, {"id": name, "modelId": name, "sha": "0" * 40, "private": False, "siblings": siblings})


_ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/models/[^/]+/[^/]+/preupload/main", "preupload"),
    (r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", "batch"),
    (r"/api/models/[^/]+/[^/]+/commit/main", "commit"),
    (r"/api/models/[^/]+/[^/]+(/revision/main)?", "info"),
)
