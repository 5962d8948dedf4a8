"""A Hub of one machine: the few requests that uploading to and loading from huggingface.co make, on loopback.

Every upload is one commit; a commit keeps the files of the one before. Nothing is written to disk.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves `repos`: repo id to a list of commits, each a dict of path to bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @staticmethod
    def sha(commits: list) -> str:
        return hashlib.sha1(str(len(commits)).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo)
        if not commits:
            return None
        for count in range(len(commits), 0, -1):
            if revision in ("main", self.sha(commits[:count])):
                return self.sha(commits[:count]), commits[count - 1]
        return None


class FakeHubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", headers=None, json_body=None):
        if json_body is not None:
            body = json.dumps(json_body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self, code):
        self.answer(404, headers={"X-Error-Code": code, "X-Error-Message": "not found"})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return self.answer(json_body={"name": "user", "type": "user", "orgs": []})
        if path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            kind = "info"
            if "/tree/" in repo:
                repo, _, rest = repo.partition("/tree/")
                kind = "tree"
            found = self.server.files(repo, rest.partition("/")[0] or "main")
            if found is None:
                return self.not_found("RepoNotFound")
            sha, files = found
            if kind == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(json_body=entries)
            info = {"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(json_body=info | {"private": False, "tags": [], "downloads": 0, "likes": 0})
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self.server.files(repo, revision)
        if found is None:
            return self.not_found("RepoNotFound")
        sha, files = found
        if name not in files:
            return self.not_found("EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
        self.answer(body=files[name], headers=headers)

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            repo = f"{json.loads(body).get('organization') or 'user'}/{name}"
            self.server.repos.setdefault(repo, [])
            return self.answer(json_body={"url": f"{self.server.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer(json_body={"errors": [], "warnings": []})
        repo = path.removeprefix("/api/models/")
        if "/preupload/" in repo:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(json_body={"files": files})
        repo, _, _ = repo.partition("/commit/")
        commits = self.server.repos[repo]
        files = dict(commits[-1]) if commits else {}
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        commits.append(files)
        sha = self.server.sha(commits)
        self.answer(json_body={"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})


@contextmanager
def fake_hub():
    """A running [`FakeHub`]."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
