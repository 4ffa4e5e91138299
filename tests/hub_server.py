"""A Hub in memory, on loopback, for the real huggingface_hub client; and the faults that it is told to have.

    with HubServer() as hub:
        hub.tokens["hf_test"] = "me"
        hub.fail("POST", "/commit/", status=503)          the next such request alone
        hub.fail("POST", "/commit/", cut="after")         it is served, and its answer is lost

What it speaks is what huggingface_hub 2.4 asks for when it creates, uploads by LFS, commits, lists and downloads.
Xet's storage is not spoken: the client must run with HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_" + "aB3" * 11  # of the account "me"
REGULAR = (".json", ".md", ".txt", ".jinja", ".gitattributes")


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]
    large: set[str]


@dataclass
class Repo:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)

    def commits(self) -> dict[str, Commit]:
        found, stack = {}, list(self.branches.values())
        for commit in stack:
            while commit is not None:
                found[commit.oid] = commit
                commit = commit.parent
        return found

    def at(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.commits().get(revision)


@dataclass
class Fault:
    """`cut`: "before" it is served, "after" (no answer), or "during" the reading of what is sent."""

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "injected"}'
    cut: str | None = None
    hang: float = 0.0
    times: int = 1


class HubServer:
    def __init__(self):
        self.tokens: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.on_request = lambda method, path: None
        self.lock = threading.RLock()
        self.stopped = threading.Event()

    def __enter__(self) -> HubServer:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, path: str, **fault) -> None:
        self.faults.append(Fault(method, path, **fault))

    def create(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        self.commit(repo_id, "main", "initial commit", {".gitattributes": b""} | (files or {}))
        return repo

    def commit(self, repo_id: str, branch: str, title: str, files: dict[str, bytes], large: set[str] = frozenset()):
        with self.lock:
            repo = self.repos[repo_id]
            parent = repo.branches.get(branch)
            files = (parent.files if parent else {}) | files
            large = (parent.large if parent else set()) | large
            seed = f"{parent.oid if parent else repo_id}{title}{sorted(files)}{time.perf_counter_ns()}"
            commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, files, large)
            repo.branches[branch] = commit
            return commit

    def asked(self, method: str, path: str) -> int:
        """How many requests of this kind there were."""
        return sum(bool(re.search(f"^{method} .*{path}", request)) for request in self.requests)


class _Answer(Exception):
    def __init__(self, status: int, body=None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds a body back for 40 ms after its headers
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            fault = next((f for f in self.hub.faults if f.method == self.command and f.path in path), None)
            if fault is not None:
                fault.times -= 1
                if fault.times == 0:
                    self.hub.faults.remove(fault)
        self.hub.on_request(self.command, path)
        if fault is not None and fault.hang:
            self.hub.stopped.wait(fault.hang)
        if fault is not None and fault.cut in ("before", "during"):
            if fault.cut == "during":
                self.rfile.read(min(1, int(self.headers.get("Content-Length") or 1)))
            return self._cut()
        sent = self._read()
        if fault is not None and fault.status is not None:
            return self._send(fault.status, fault.body, fault.headers)
        try:
            with self.hub.lock:
                self._route(path, sent)
            raise AssertionError("every route answers")
        except _Answer as answer:
            if fault is not None and fault.cut == "after":
                return self._cut()
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self._send(answer.status, body, answer.headers)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        with suppress(ConnectionError):  # of a client that has not waited
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            said = "Invalid credentials in Authorization header"
            raise _Answer(401, {"error": said}, X_Error_Message=said)
        return self.hub.tokens.get(token)

    def _route(self, path: str, sent: bytes) -> None:
        if path.startswith("/lfs/"):
            self._large(path, sent)
        user = self._user()
        if path == "/api/whoami-v2":
            raise _Answer(200 if user else 401, {"name": user, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            raise _Answer(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            self._create(json.loads(sent), user)
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._repo(match[1], user, write=True)
            self._batch(json.loads(sent))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._download(self._commit_at(self._repo(match[1], user), match[2]), match[3])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            verb = match[2] or "revision"
            repo = self._repo(match[1], user, write=self.command == "POST")
            getattr(self, f"_{verb}", self._unknown)(match[1], repo, match[3] or "main", sent)
        self._unknown()

    def _unknown(self, *args) -> None:
        raise _Answer(404, {"error": f"no such route: {self.command} {self.path}"})

    def _repo(self, repo_id: str, user: str | None, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise _Answer(404 if user else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write and user != repo_id.split("/")[0]:
            raise _Answer(403, {"error": "Forbidden"}, X_Error_Message="you may not write here")
        return repo

    def _commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return commit

    def _create(self, asked: dict, user: str | None) -> None:
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if repo_id.split("/")[0] != user:
            raise _Answer(403 if user else 401, {"error": "Forbidden"}, X_Error_Message="not your namespace")
        if repo_id in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        raise _Answer(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _batch(self, asked: dict) -> None:
        objects = []
        for item in asked["objects"]:
            href = f"{self.hub.url}/lfs/{item['oid']}"
            actions = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(item | ({} if item["oid"] in self.hub.stored else actions))
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _large(self, path: str, sent: bytes) -> None:
        oid = path.split("/")[2]
        if path.endswith("/verify"):
            asked = json.loads(sent)
            right = asked["size"] == len(self.hub.stored.get(oid, b"")) and asked["oid"] == oid
            raise _Answer(200 if right else 422, {})
        if hashlib.sha256(sent).hexdigest() != oid:
            raise _Answer(400, {"error": "the content is not that of its id"})
        self.hub.stored[oid] = sent
        raise _Answer(200, {})

    def _revision(self, repo_id: str, repo: Repo, revision: str, sent: bytes) -> None:
        commit = self._commit_at(repo, revision)
        files = [{"rfilename": name} for name in commit.files]
        raise _Answer(200, {"id": repo_id, "sha": commit.oid, "private": repo.private, "siblings": files, "tags": []})

    def _branch(self, repo_id: str, repo: Repo, branch: str, sent: bytes) -> None:
        if branch in repo.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        raise _Answer(200, {})

    def _preupload(self, repo_id: str, repo: Repo, revision: str, sent: bytes) -> None:
        commit, answers = self._commit_at(repo, revision), []
        ignored = commit.files.get(".gitignore", b"").decode().split()
        for item in json.loads(sent)["files"]:
            name, mode = item["path"], "regular" if item["path"].endswith(REGULAR) else "lfs"
            entry = _entry(commit, name) if name in commit.files else {}
            there = entry.get("lfs", entry).get("oid")
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": name in ignored, "oid": there})
        raise _Answer(200, {"files": answers})

    def _commit(self, repo_id: str, repo: Repo, branch: str, sent: bytes) -> None:
        header, *lines = [json.loads(line) for line in sent.splitlines()]
        if branch not in repo.branches:
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        if header["value"].get("parentCommit", repo.branches[branch].oid) != repo.branches[branch].oid:
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files, large = {}, set()
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise _Answer(400, {"error": f"LFS object {value['oid']} does not exist"})
                files[value["path"]] = self.hub.stored[value["oid"]]
                large.add(value["path"])
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit(repo_id, branch, header["value"]["summary"], files, large)
        raise _Answer(200, {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}"})

    def _commits(self, repo_id: str, repo: Repo, revision: str, sent: bytes) -> None:
        commit, found = self._commit_at(repo, revision), []
        while commit is not None:
            found.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": _DATE})
            commit = commit.parent
        raise _Answer(200, found)

    def _tree(self, repo_id: str, repo: Repo, revision: str, sent: bytes) -> None:
        revision, _, folder = revision.partition("/")
        commit = self._commit_at(repo, revision)
        names = [name for name in sorted(commit.files) if not folder or name.startswith(f"{folder}/")]
        if not names:
            raise _Answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        raise _Answer(200, [_entry(commit, name) for name in names])

    def _download(self, commit: Commit, name: str) -> None:
        if name not in commit.files:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        entry, content = _entry(commit, name), commit.files[name]
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        # the start is asked for, to go on with a download that was interrupted
        raise _Answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit.oid, X_Linked_Size=str(len(content)))


_DATE = "2026-01-01T00:00:00.000Z"


def _entry(commit: Commit, name: str) -> dict:
    content = commit.files[name]
    entry = {"type": "file", "path": name, "size": len(content)}
    if name not in commit.large:
        return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), "lfs": lfs}
