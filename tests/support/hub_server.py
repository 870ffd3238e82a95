"""A small Hugging Face Hub on 127.0.0.1: the endpoints that its clients use for models, and storage at another address.

What it answers is what huggingface_hub 2.4 was seen to need; that client is the proof of it (test_hub_peers). Large files are
on a second server to which downloads are redirected and uploads are sent, so that a test sees who is told the token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from weakref import WeakSet

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.gguf filter=lfs diff=lfs merge=lfs -text\n"
TOKEN = "hf_" + "t" * 40
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


@dataclass(frozen=True)
class File:
    """The bytes of a file, and whether git keeps a pointer to them."""

    data: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        blob = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Commit:
    oid: str
    files: dict[str, File]
    title: str
    parent: Commit | None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    gated_files: bool = False  # what the Hub has of a gated model is listed for all
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, files: dict[str, File], title: str, parent: Commit | None) -> Commit:
        text = f"{title} {parent.oid if parent else ''} {len(self.commits)} {sorted((k, v.oid) for k, v in files.items())}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, title, parent)
        self.commits[commit.oid] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        self.status, self.code, self.message, self.commit = status, code, message, commit


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    pattern = pattern.replace("{id}", r"(?P<repo>[^/]+/[^/]+)").replace("{rev}", r"(?P<rev>[^/]+)")

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        with self.server.lock:
            self.server.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        try:
            for method, pattern, function in _ROUTES:
                if method == ("GET" if self.command == "HEAD" else self.command) and (
                    path_match := pattern.fullmatch(parts.path)
                ):
                    with self.server.lock:
                        words = {key: unquote(value or "") for key, value in path_match.groupdict().items()}
                        function(self, body, parse_qs(parts.query), **words)
                    return
            raise Refusal(404, "", "no such endpoint")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, "X-Repo-Commit": refusal.commit}
            document = {"error": refusal.message or refusal.code}
            self.send(refusal.status, document, **{key: value for key, value in headers.items() if value})

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def send(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, data: bytes, **headers: str) -> None:
        """The data, or the range of it that was asked for."""
        range_match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not range_match:
            self.send(200, data, **{"Accept-Ranges": "bytes", **headers})
            return
        start, end = int(range_match[1]), min(int(range_match[2] or len(data) - 1) + 1, len(data))
        if start >= len(data):
            raise Refusal(416)
        self.send(206, data[start:end], **{**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def link(self, path: str) -> str:
        """An address of this server as whoever asks knows it."""
        return f"http://{self.headers['Host']}{path}"

    def repo(self, name: str, *, write: bool = False) -> Repo:
        token = self.server.token
        is_authorized = self.headers.get("Authorization") == f"Bearer {token}"
        if self.headers.get("Authorization") and token and not is_authorized:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if write and token and not is_authorized:
            raise Refusal(401, "", "Invalid username or password.")
        hub_repo = self.server.repos.get(name)
        if hub_repo is None or (hub_repo.private and not is_authorized):
            raise Refusal(404 if is_authorized or not token else 401, "RepoNotFound", "Repository not found")
        if hub_repo.gated and not write:
            raise Refusal(403 if is_authorized else 401, "GatedRepo", f"Access to model {name} is restricted")
        return hub_repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        found_commit = repo.find(revision)
        if found_commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found_commit

    def log_message(self, *_: Any) -> None:
        """Nothing."""


# ---- reading


def info(handler: Handler, name: str, repo: Repo, revision: str, blobs: bool) -> None:
    commit = handler.commit(repo, revision)
    siblings = []
    for path, file in sorted(commit.files.items()):
        entry: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry |= {"size": len(file.data), "blobId": file.oid}
            if file.large:
                entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
        siblings.append(entry)
    card = commit.files.get("README.md")
    date = "2026-01-01T00:00:00.000Z"
    document = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "gated": repo.gated}
    document |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "lastModified": date, "createdAt": date}
    handler.send(200, document | ({"cardData": _front_matter(card.data)} if card else {}))


def _front_matter(data: bytes) -> dict[str, Any]:
    import yaml

    front_matter = re.match(rb"---\r?\n(.*?)\r?\n---", data, re.DOTALL)
    return dict(yaml.safe_load(front_matter[1]) or {}) if front_matter else {}


@route("GET", r"/api/models/{id}")
def model(handler: Handler, _body: bytes, query: dict[str, Any], repo: str) -> None:
    info(handler, repo, handler.repo(repo), "main", "blobs" in query)


@route("GET", r"/api/models/{id}/revision/{rev}")
def model_revision(handler: Handler, _body: bytes, query: dict[str, Any], repo: str, rev: str) -> None:
    info(handler, repo, handler.repo(repo), rev, "blobs" in query)


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return {"type": "file", "path": path, "size": len(file.data), "oid": file.oid} | ({"lfs": lfs} if file.large else {})


@route("GET", r"/api/models/{id}/tree/{rev}(?:/(?P<path>.*))?")
def tree(handler: Handler, _body: bytes, _query: dict[str, Any], repo: str, rev: str, path: str) -> None:
    files = handler.commit(handler.repo(repo), rev).files
    start = f"{path}/" if path else ""
    handler.send(200, [_entry(name, file) for name, file in sorted(files.items()) if name.startswith(start)])


@route("POST", r"/api/models/{id}/paths-info/{rev}")
def paths_info(handler: Handler, body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    files = handler.commit(handler.repo(repo), rev).files
    requested_paths = parse_qs(body.decode()).get("paths", [])
    handler.send(200, [_entry(path, files[path]) for path in requested_paths if path in files])


@route("GET", r"/api/models/{id}/refs")
def refs(handler: Handler, _body: bytes, _query: dict[str, Any], repo: str) -> None:
    hub_repo = handler.repo(repo)
    kinds = (("branches", "heads", hub_repo.branches), ("tags", "tags", hub_repo.tags))
    handler.send(
        200,
        {"converts": []}
        | {
            kind: [{"name": name, "ref": f"refs/{path}/{name}", "targetCommit": commit.oid} for name, commit in names.items()]
            for kind, path, names in kinds
        },
    )


@route("GET", r"/api/models/{id}/commits/{rev}")
def commits(handler: Handler, _body: bytes, query: dict[str, Any], repo: str, rev: str) -> None:
    at: Commit | None = handler.commit(handler.repo(repo), rev)
    entries = []
    while at:
        entries.append({"id": at.oid, "title": at.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"})
        at = at.parent
    page, size = int(query.get("p", ["0"])[0]), 3
    link = {"Link": f'<{handler.link(f"/api/models/{repo}/commits/{rev}?p={page + 1}")}>; rel="next"'}
    handler.send(200, entries[page * size : (page + 1) * size], **(link if len(entries) > (page + 1) * size else {}))


@route("GET", r"/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(handler: Handler, _body: bytes, _query: dict[str, Any], repo: str, rev: str, path: str) -> None:
    commit = handler.commit(handler.repo(repo), rev)
    if handler.server.repos[repo].gated_files:
        raise Refusal(401, "GatedRepo", f"Access to model {repo} is restricted")
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found", commit.oid)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if not file.large:
        handler.send_file(file.data, **headers)
        return
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "ETag": f'"{file.sha256}"'}
    if handler.server.storage is None:
        handler.send_file(file.data, **headers)
    else:
        handler.send(302, **{**headers, "Location": f"{handler.server.storage.url}/{file.sha256}?signature=s"})


# ---- writing


@route("POST", r"/api/repos/create")
def create(handler: Handler, body: bytes, _query: dict[str, Any]) -> None:
    requested_document = json.loads(body)
    name = f"{requested_document['organization'] or 'user'}/{requested_document['name']}"
    token = handler.server.token
    if token and handler.headers.get("Authorization") != f"Bearer {token}":
        raise Refusal(401, "", "Invalid username or password.")
    document = {"url": handler.link(f"/{name}"), "name": name, "id": "0"}
    if name in handler.server.repos:
        handler.send(409, {**document, "error": "You already created this model repo"})
        return
    repo = handler.server.repos[name] = Repo(
        private=requested_document.get("visibility") == "private" or bool(requested_document.get("private"))
    )
    repo.branches["main"] = repo.add({".gitattributes": File(ATTRIBUTES)}, "initial commit", None)
    handler.send(200, document)


@route("GET", r"/api/whoami-v2")
def whoami(handler: Handler, _body: bytes, _query: dict[str, Any]) -> None:
    token = handler.server.token
    if token and handler.headers.get("Authorization") != f"Bearer {token}":
        raise Refusal(401, "", "Invalid username or password.")
    handler.send(200, {"name": "user", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": handler.server.role}}})


@route("POST", r"/api/validate-yaml")
def validate_yaml(handler: Handler, body: bytes, _query: dict[str, Any]) -> None:
    import yaml

    try:
        _front_matter(json.loads(body)["content"].encode())
        handler.send(200, {"errors": [], "warnings": []})
    except yaml.YAMLError as error:
        handler.send(400, {"errors": [{"message": str(error)}], "warnings": []})


def is_large(path: str, sample: bytes, size: int) -> bool:
    return path.endswith((".safetensors", ".gguf", ".bin", ".png")) or size >= 10_000_000 or b"\0" in sample


@route("POST", r"/api/models/{id}/preupload/{rev}")
def preupload(handler: Handler, body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    commit, file_entries = handler.commit(handler.repo(repo, write=True), rev), []
    for files in json.loads(body)["files"]:
        large = is_large(files["path"], base64.b64decode(files["sample"]), files["size"])
        stored_file = commit.files.get(files["path"])
        oid = (stored_file.sha256 if stored_file.large else stored_file.oid) if stored_file else None
        mode = "lfs" if large else "regular"
        file_entries.append({"path": files["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    handler.send(200, {"files": file_entries})


@route("POST", r"/{id}\.git/info/lfs/objects/batch")
def batch(handler: Handler, body: bytes, _query: dict[str, Any], repo: str) -> None:
    handler.repo(repo, write=True)
    hub, objects = handler.server, []
    for object_entry in json.loads(body)["objects"]:
        oid, size = object_entry["oid"], object_entry["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.large:
            href = f"{hub.storage.url}/{oid}?signature=s" if hub.storage else handler.link(f"/storage/{oid}?signature=s")
            upload: dict[str, Any] = {"href": href, "header": {}}
            if hub.part and size > hub.part:
                numbers = range(1, -(-size // hub.part) + 1)
                upload["header"] = {"chunk_size": str(hub.part)} | {str(n): f"{href}&part={n}" for n in numbers}
                upload["href"] = handler.link(f"/{repo}.git/complete")
            entry["actions"] = {"upload": upload, "verify": {"href": handler.link(f"/{repo}.git/verify")}}
        objects.append(entry)
    handler.send(200, {"transfer": "basic", "objects": objects})


@route("PUT", r"/(?:storage/)?(?P<oid>[0-9a-f]{64})")
def put_object(handler: Handler, body: bytes, query: dict[str, Any], oid: str) -> None:
    hub = handler.server.hub
    if "part" in query:
        hub.parts[oid, int(query["part"][0])] = body
        handler.send(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        return
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, "", "BadDigest")
    hub.large[oid] = body
    handler.send(200, ETag='"x"')


@route("GET", r"/(?P<oid>[0-9a-f]{64})")
def get(handler: Handler, _body: bytes, _query: dict[str, Any], oid: str) -> None:
    if oid not in handler.server.hub.large:
        raise Refusal(404, "", "NoSuchKey")
    handler.send_file(handler.server.hub.large[oid], ETag=f'"{oid}"')


@route("POST", r"/{id}\.git/complete")
def complete(handler: Handler, body: bytes, _query: dict[str, Any], repo: str) -> None:
    document, hub = json.loads(body), handler.server
    parts = [hub.parts.pop((document["oid"], part["partNumber"])) for part in document["parts"]]
    wrong = [f'"{hashlib.md5(data).hexdigest()}"' for data in parts] != [part["etag"] for part in document["parts"]]
    if wrong or hashlib.sha256(b"".join(parts)).hexdigest() != document["oid"]:
        raise Refusal(400, "", "BadDigest")
    hub.large[document["oid"]] = b"".join(parts)
    handler.send(200, {})


@route("POST", r"/{id}\.git/verify")
def verify(handler: Handler, body: bytes, _query: dict[str, Any], repo: str) -> None:
    handler.repo(repo, write=True)
    document = json.loads(body)
    if len(handler.server.large.get(document["oid"], b"")) != document["size"]:
        raise Refusal(404, "", "no such object")
    handler.send(200, {})


@route("POST", r"/api/models/{id}/commit/{rev}")
def make_commit(handler: Handler, body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    hub_repo = handler.repo(repo, write=True)
    head = hub_repo.branches.get(rev)
    if head is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    header, *lines = [json.loads(line) for line in body.splitlines()]
    if header["value"].get("parentCommit", head.oid) != head.oid:
        raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            if value["oid"] not in handler.server.large:
                raise Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = File(handler.server.large[value["oid"]], large=True)
        elif line["key"] == "deletedFile":
            if value["path"] not in files:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[value["path"]]
        else:
            raise Refusal(501, "", line["key"])
    new_commit = hub_repo.branches[rev] = hub_repo.add(files, header["value"]["summary"], head)
    url = handler.link(f"/{repo}/commit/{new_commit.oid}")
    handler.send(200, {"success": True, "commitOid": new_commit.oid, "commitUrl": url, "hookOutput": ""})


@route("POST", r"/api/models/{id}/branch/{rev}")
def branch(handler: Handler, body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    hub_repo = handler.repo(repo, write=True)
    if rev in hub_repo.branches or rev in hub_repo.tags:
        raise Refusal(409, "", f"Reference already exists: {rev}")
    hub_repo.branches[rev] = handler.commit(hub_repo, json.loads(body or b"{}").get("startingPoint", "main"))
    handler.send(201)


@route("DELETE", r"/api/models/{id}/branch/{rev}")
def drop_branch(handler: Handler, _body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    hub_repo = handler.repo(repo, write=True)
    handler.commit(hub_repo, rev)
    del hub_repo.branches[rev]
    handler.send(200)


@route("POST", r"/api/models/{id}/tag/{rev}")
def tag(handler: Handler, body: bytes, _query: dict[str, Any], repo: str, rev: str) -> None:
    hub_repo, name = handler.repo(repo, write=True), json.loads(body)["tag"]
    if name in hub_repo.tags:
        raise Refusal(409, "", f"Tag reference exists already: {name}")
    hub_repo.tags[name] = handler.commit(hub_repo, rev)
    handler.send(201)


class Hub(ThreadingHTTPServer):
    """A context manager that runs it.

    Attributes:
        token: Who may write and see what is private; everybody without one.
        storage: Where large files are; None to keep them here, as a proxy in front of it would like.
        part: Bytes of a part of a large file; 0 for files in one piece.
        role: What the token may do, `write` or `read`.
    """

    daemon_threads = True

    def __init__(self, *, token: str | None = None, storage: bool = True, part: int = 0, hub: Hub | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.part, self.role = token, part, "write"
        self.hub = hub or self
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.RLock()
        self.sockets: WeakSet[socket.socket] = WeakSet()
        self.storage = Hub(storage=False, hub=self) if storage else None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        self.sockets.add(sock)
        return sock, address

    def __enter__(self) -> Hub:
        if self.storage:
            self.storage.__enter__()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        for sock in list(self.sockets):  # its threads would answer on those that a client keeps open
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self.storage:
            self.storage.__exit__()
