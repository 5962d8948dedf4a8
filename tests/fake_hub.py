"""A Hub of one machine: the few requests that uploading to and loading from huggingface.co make, on loopback.

Every upload is one commit; a commit keeps the files of the one before. Nothing is written to disk. Xet, today's
protocol for large files, is not spoken: run with HF_HUB_DISABLE_XET=1, and LFS takes its place.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKENS = {"hf_token": 200, "hf_read": 403}
API = re.compile(
    r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|variables)(?:/([^/]+))?)?.*"
)
RESOLVE = re.compile(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.*)")
LFS = re.compile(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class FakeHub(ThreadingHTTPServer):
    """Serves `repos`: repo id, after "datasets/" or "spaces/", to a list of commits, each a dict of path to bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.clear()

    def clear(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.variables: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []
        self.lfs_threshold = float("inf")  # larger files go by LFS
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs_limit = float("inf")  # so many objects, then every upload fails
        self.needs_token = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @staticmethod
    def sha(commits: list) -> str:
        return hashlib.sha1(str(len(commits)).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo)
        if commits is None:
            return None
        for count in range(len(commits), 0, -1):
            if revision in ("main", self.sha(commits[:count])):
                return self.sha(commits[:count]), commits[count - 1]
        return ("0" * 40, {}) if not commits else None


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

    def refuse(self, status, code, message="not found"):
        self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def repo_of(self, kind, name):
        return name if kind == "models" else f"{kind}/{name}"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return self.answer(json_body={"name": "user", "type": "user", "orgs": []})
        if match := API.fullmatch(path):
            kind, name, part, revision = match.groups()
            repo = self.repo_of(kind, name)
            found = self.server.files(repo, revision or "main")
            if found is None:
                return self.refuse(404, "RevisionNotFound" if repo in self.server.repos else "RepoNotFound")
            sha, files = found
            if part == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(json_body=entries)
            front_matter = files.get("README.md", b"").decode().split("---")[1:2]
            info = {"cardData": yaml.safe_load(front_matter[0])} if front_matter else {}
            info |= {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            is_private = repo in self.server.private
            return self.answer(json_body=info | {"private": is_private, "tags": [], "downloads": 0, "likes": 0})
        match = RESOLVE.fullmatch(path)
        found = match and self.server.files(match[1], match[2])
        if not found:
            return self.refuse(404, "RepoNotFound")
        sha, files = found
        if match[3] not in files:
            return self.refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(files[match[3]]).hexdigest()}"'}
        self.answer(body=files[match[3]], headers=headers)

    do_HEAD = do_GET

    def do_PUT(self):
        oid = urlsplit(self.path).path.removeprefix("/lfs/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"PUT {oid}")
        if len(self.server.lfs_objects) >= self.server.lfs_limit:
            return self.refuse(400, "Broken", "the line is cut")
        self.server.lfs_objects[oid] = body
        self.answer()

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.needs_token:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if (status := TOKENS.get(token, 401)) != 200:
                return self.refuse(status, "Refused", "Invalid credentials" if status == 401 else "Forbidden")
        if path == "/api/repos/create":
            request = json.loads(body)
            kind = (request.get("type") or "model") + "s"
            name = f"{request.get('organization') or 'user'}/{request['name']}"
            repo = self.repo_of(kind, name)
            self.server.repos.setdefault(repo, [])
            if request.get("private") or request.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer(json_body={"url": f"{self.server.url}/{repo}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(json_body={"errors": [], "warnings": []})
        if LFS.fullmatch(path):
            objects = [
                entry | ({} if entry["oid"] in self.server.lfs_objects else self.upload_action(entry["oid"]))
                for entry in json.loads(body)["objects"]
            ]
            return self.answer(json_body={"transfer": "basic", "objects": objects})
        kind, name, part, _ = API.fullmatch(path).groups()
        repo = self.repo_of(kind, name)
        if part == "variables":
            self.server.variables.setdefault(repo, {})[json.loads(body)["key"]] = json.loads(body)["value"]
            return self.answer(json_body=self.variables(repo))
        if part == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > self.server.lfs_threshold else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(json_body={"files": files})
        commits = self.server.repos[repo]
        files = dict(commits[-1]) if commits else {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs_objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        sha = self.server.sha(commits)
        self.answer(json_body={"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def upload_action(self, oid):
        return {"actions": {"upload": {"href": f"{self.server.url}/lfs/{oid}", "header": {}}}}

    def variables(self, repo):
        return {key: {"value": value, "updatedAt": None} for key, value in self.server.variables[repo].items()}


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
