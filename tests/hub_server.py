"""
A small Hub on the loopback interface. It has the parts of the Hub's HTTP interface that are used for pushing and
loading, so that the real client can be tested without a network. Repos are in memory, and commits are atomic.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".png")  # files that the Hub keeps as LFS files
OWNER = "ada"
WRITE_TOKEN, READ_TOKEN = "hf_ada_writes", "hf_ada_reads"  # of the only account of this Hub


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self):
        content = self.content
        if self.is_lfs:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(content),
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    sdk: str | None = None
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # the files of each commit, by its id
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch, tree, message):
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision):
        """The commit's id, or `None`."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repos: by kind and name, such as `("models", "ada/vlv-tiny")`.
        stored: uploaded large files by their sha256, also those of no commit.
        uploads: sha256 of every large file, in the order of upload.
        fail: `fail(method, path) -> bool`; requests for which it is true get the answer 400.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.fail = lambda method, path: False
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo_id, folder, revision="main", private=False):
        """Add a folder as a model repo, as if a user had pushed it."""
        repo = self.repos["models", repo_id] = Repo(private)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        tree = {name: Blob(path.read_bytes(), path.suffix in LARGE) for name, path in files.items()}
        repo.commit(revision, tree, "publish")

    def files(self, repo_id, kind="models", revision="main"):
        """The content of every file of a revision, by path."""
        repo = self.repos[kind, repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision)].items()}


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Answer(Exception):  # noqa: N818  (it ends the handling of a request, and need not be an error)
    def __init__(self, status, content=b"", **headers):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|spaces)/{NAME}"
FILES = rf"/(?:(?P<kind>spaces)/)?{NAME}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/branch/(?P<branch>.+)", "create_branch"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("HEAD", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self._read_chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            if self.server.fail(self.command, url.path):
                raise Answer(400, {"error": "This hub was told to fail."})
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method == self.command:
                    with self.server.lock:
                        arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                        getattr(self, name)(**arguments)
            raise Answer(404, {"error": f"This hub has no {self.command} {url.path}."})
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def _read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ---- tokens ------------------------------------------------------------------------------------------------

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _require(self, *tokens, owner=OWNER):
        if self.token not in (WRITE_TOKEN, READ_TOKEN):
            raise Answer(401, {"error": "Invalid username or password."})
        if self.token not in tokens or owner != OWNER:
            raise Answer(403, {"error": "Forbidden: you must use a write token."})

    def _repo(self, kind, name, write=False):
        repo = self.server.repos.get((kind or "models", name))
        if repo is None or (repo.private and self.token not in (WRITE_TOKEN, READ_TOKEN)):
            raise Answer(
                401 if not self.token else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
        if write:
            self._require(WRITE_TOKEN, owner=name.split("/")[0])
        return repo

    def _commit_of(self, repo, revision):
        oid = repo.resolve(revision)
        if oid is None:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return oid

    # ---- the interface -----------------------------------------------------------------------------------------

    def whoami(self):
        self._require(WRITE_TOKEN, READ_TOKEN)
        role = "write" if self.token == WRITE_TOKEN else "read"
        raise Answer(200, {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            raise Answer(400, {"errors": [{"message": "There is no metadata."}], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or OWNER
        self._require(WRITE_TOKEN, owner=owner)
        key = wanted.get("type", "model") + "s", f"{owner}/{wanted['name']}"
        if key in self.server.repos:
            raise Answer(409, {"error": "You already created this repo", "url": f"{self.server.url}/{key[1]}"})
        if key[0] == "spaces" and not wanted.get("sdk"):
            raise Answer(400, {"error": "A Space needs an sdk."})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repos[key] = Repo(private, wanted.get("sdk"))
        raise Answer(200, {"url": f"{self.server.url}/{key[1]}", "name": key[1], "id": key[1]})

    def info(self, kind, name, revision=None):
        repo = self._repo(kind, name)
        oid = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        raise Answer(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, kind, name, revision, path=None):
        repo = self._repo(kind, name)
        oid = self._commit_of(repo, revision)
        prefix = f"{path}/" if path else ""
        files = {file: blob for file, blob in repo.commits[oid].items() if file.startswith(prefix)}
        if path and not files:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        entries = []
        for file, blob in files.items():
            entry = {"type": "file", "path": file, "size": len(blob.content), "oid": blob.git_oid}
            if blob.is_lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        raise Answer(200, entries)

    def create_branch(self, kind, name, branch):
        repo = self._repo(kind, name, write=True)
        if branch in repo.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        raise Answer(200, {})

    def preupload(self, kind, name, revision):
        repo = self._repo(kind, name, write=True)
        tree = repo.commits[self._commit_of(repo, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LARGE)
            old = tree.get(file["path"])
            oid = old and (old.sha256 if old.is_lfs else old.git_oid)
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": files})

    def lfs_batch(self, kind, name):
        self._repo(kind, name, write=True)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.server.stored:
                each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(422, {"error": "The content does not match its oid."})
        self.server.stored[oid] = self.body
        self.server.uploads.append(oid)
        raise Answer(200)

    def commit(self, kind, name, revision):
        repo = self._repo(kind, name, write=True)
        tree = dict(repo.commits[self._commit_of(repo, revision)])
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Answer(400, {"error": f"{value['path']} was never uploaded."})
                tree[value["path"]] = Blob(self.server.stored[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise Answer(400, {"error": f"This hub does not know {operation['key']}."})
        answer = {}
        if self.query.get("create_pr"):
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        oid = repo.commit(revision, tree, message)
        raise Answer(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", **answer})

    def download(self, kind, name, revision, path):
        repo = self._repo(kind, name)
        oid = self._commit_of(repo, revision)
        blob = repo.commits[oid].get(path)
        if blob is None:
            raise Answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = f'"{blob.sha256 if blob.is_lfs else blob.git_oid}"'
        raise Answer(200, blob.content, X_Repo_Commit=oid, ETag=etag, Accept_Ranges="none")
