"""A Hub on the loopback interface: the routes with which `huggingface_hub` pushes and loads models.

Repositories are kept in memory. Large files (by name, as on the Hub) are transferred by git LFS and served under
another host name, which must not receive a token. `HubServer.failures` makes requests fail, and `HubServer.requests`
records them.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".pt")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    parent: "Commit | None" = None

    def history(self):
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)

    def commit(self, revision):
        if revision in self.branches:
            return self.branches[revision]
        commits = (commit for head in self.branches.values() for commit in head.history())
        return next((commit for commit in commits if commit.oid == revision), None)

    def add(self, revision, files, message):
        parent = self.branches[revision]
        oid = hashlib.sha1(f"{parent.oid}{message}{sorted(files)}".encode()).hexdigest()
        self.branches[revision] = Commit(oid, message, files, parent)
        return oid


@dataclass
class Failure:
    """A rule by which matching requests fail: with a status, or ("cut") with a connection closed during the upload."""

    method: str
    path: str
    what: int | str = 500
    times: float = float("inf")


@dataclass
class Request:
    method: str
    path: str
    host: str
    token: str | None
    body: bytes


class HubServer:
    """A context manager. `tokens` maps a token to its user and its permission ("write" or "read")."""

    def __init__(self, tokens=()):
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def files(self, repo_id, revision="main"):
        """Return the files of a repository, including large ones."""
        return self.repos[repo_id].commit(revision).files

    def messages(self, repo_id, revision="main"):
        """Return the messages of its commits in chronological order."""
        return [commit.message for commit in self.repos[repo_id].branches[revision].history()][::-1]

    def fail(self, method, path, what=500, times=float("inf")):
        self.failures.append(Failure(method, path, what, times))


def check_metadata(content):
    """Return the errors in the metadata of a model card, by the rules of the Hub's modelcard.md."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["there is no metadata"]
    data, errors = yaml.safe_load(match.group(1)), []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co.')
    for name in ("tags", "metrics", "language"):
        if not all(isinstance(value, str) for value in data.get(name) or []):
            errors.append(f'"{name}" must be an array of strings')
    for name in ("pipeline_tag", "library_name", "license"):
        if name in data and not (isinstance(data[name], str) and re.fullmatch(r"[a-z0-9.-]+", data[name])):
            errors.append(f'"{name}" must be a string')
    for i, model in enumerate(data.get("model-index") or []):
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(model.get("results", [])):
            where = f"model-index[{i}].results[{j}]"
            required = {"task.type": result.get("task", {}).get("type")}
            required |= {f"dataset.{key}": result.get("dataset", {}).get(key) for key in ("type", "name")}
            for k, metric in enumerate(result.get("metrics") or [{}]):
                required |= {f"metrics[{k}].type": metric.get("type"), f"metrics[{k}].value": metric.get("value")}
            errors += [f'"{where}.{key}" is required' for key, value in required.items() if value is None]
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    # ---- every request ----

    def log_message(self, *_):
        pass

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization") or ""
        self.token = authorization.removeprefix("Bearer ") or None
        failure = self.failure(url.path)
        if failure == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self.read_chunks() if chunked else self.rfile.read(length)
        with self.hub.lock:
            host = self.headers.get("Host", "")
            self.hub.requests.append(Request(self.command, url.path, host, self.token, self.body))
            if failure is not None:
                self.error(int(failure), "requested by the test")
                return
            for pattern, name in ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {url.path}")
                if match:
                    getattr(self, name)(*(unquote(part or "") for part in match.groups()))
                    return
        self.error(404, f"no route {self.command} {url.path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def failure(self, path):
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.method == self.command and re.search(failure.path, path) and failure.times > 0:
                    failure.times -= 1
                    return failure.what
        return None

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=None):
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer(status, {"error": message}, headers)

    # ---- permissions ----

    @property
    def user(self):
        return self.hub.tokens.get(self.token, (None, None))[0]

    def repo(self, repo_id, write=False):
        """Return the repository, or None after answering with an error."""
        if self.token is not None and self.token not in self.hub.tokens:
            self.error(401, "Invalid credentials in Authorization header")
            return None
        repo, owner = self.hub.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            # Without permission to read, the answer does not reveal whether the repository exists.
            status = (401, "Invalid username or password.") if self.user is None else (404, "Repository not found")
            self.error(*status, code="RepoNotFound")
            return None
        if write and (self.user != owner or self.hub.tokens[self.token][1] != "write"):
            self.error(403, "you have no write access to this repository")
            return None
        return repo

    def commit_of(self, repo_id, revision):
        repo = self.repo(repo_id)
        commit = repo and repo.commit(revision)
        if repo is not None and commit is None:
            self.error(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit

    # ---- the routes ----

    def whoami(self):
        if self.user is None:
            self.error(401, "Invalid username or password.")
        else:
            self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        wanted = json.loads(self.body)
        if self.user is None:
            self.error(401, "Invalid username or password.")
            return
        owner = wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if owner != self.user or self.hub.tokens[self.token][1] != "write":
            self.error(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        elif repo_id in self.hub.repos:
            self.answer(409, {**answer, "error": "You already created this model repo"})
        else:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {})
            self.hub.repos[repo_id] = Repo(private, {"main": first})
            self.answer(200, answer)

    def info(self, repo_id, revision=""):
        commit = self.commit_of(repo_id, revision or "main")
        if commit is not None:
            siblings = [{"rfilename": path} for path in commit.files]
            private = self.hub.repos[repo_id].private
            card = commit.files.get("README.md", b"").decode()
            metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
            known = {key: metadata[key] for key in ("pipeline_tag", "library_name", "tags") if key in metadata}
            answer = {"id": repo_id, "sha": commit.oid, "private": private, "siblings": siblings, **known}
            self.answer(200, answer)

    def may_write(self, repo_id):
        if self.repo(repo_id, write=True):
            self.answer(200, {})

    def branch(self, repo_id, name):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        if name in repo.branches:
            self.error(409, f"Reference already exists: {name}")
        else:
            repo.branches[name] = repo.commit(json.loads(self.body or b"{}").get("startingPoint", "main"))
            self.answer(201, {})

    def validate(self):
        errors = check_metadata(json.loads(self.body)["content"])
        found = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(400 if errors else 200, found)

    def preupload(self, repo_id, revision):
        if self.repo(repo_id, write=True) is None:
            return
        commit = self.commit_of(repo_id, revision)
        if commit is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(file["path"], commit.files.get(file["path"])),
                }
                for file in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, repo_id):
        if self.repo(repo_id, write=True) is None:
            return
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.storage}/storage/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo_id}/verify"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400, "the content does not match its hash")
        else:
            self.hub.large[oid] = self.body
            self.answer(200)

    def stored(self, oid):
        content = self.hub.large[oid]
        self.answer(200, content, {"ETag": f'"{oid}"'})

    def verify(self, repo_id):
        wanted = json.loads(self.body)
        if self.repo(repo_id, write=True) is not None:
            stored = self.hub.large.get(wanted["oid"])
            complete = stored is not None and len(stored) == wanted["size"]
            self.answer(200, {}) if complete else self.error(404, "Object does not exist")

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        if repo is None or self.commit_of(repo_id, revision) is None:
            return
        files, message = dict(repo.branches[revision].files), ""
        for line in self.body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repo.add(revision, files, message)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def tree(self, repo_id, revision, under=""):
        commit = self.commit_of(repo_id, revision)
        if commit is None:
            return
        inside = {p: c for p, c in commit.files.items() if p.startswith(under.strip("/"))}
        entries = []
        for path, content in inside.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries, {"Content-Type": "application/json"})

    def resolve(self, repo_id, revision, path):
        commit = self.commit_of(repo_id, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound",
                                                            "X-Error-Message": "Entry not found"})  # fmt: skip
            return
        content = commit.files[path]
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self.answer(302, b"", {**headers, "Location": f"{self.hub.storage}/storage/{sha256(content)}"})
        else:
            self.answer(200, content, {**headers, "ETag": f'"{git_oid(content)}"'})


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid_of(path, content):
    """Return the identifier with which the client recognizes unchanged files."""
    if content is None:
        return None
    return sha256(content) if path.endswith(LARGE) else git_oid(content)


MODEL = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    (f"GET /api/models/{MODEL}", "info"),
    (f"GET /api/models/{MODEL}/revision/([^/]+)", "info"),
    (f"GET /api/models/{MODEL}/auth-check/write", "may_write"),
    (f"POST /api/models/{MODEL}/branch/([^/]+)", "branch"),
    (f"POST /api/models/{MODEL}/preupload/([^/]+)", "preupload"),
    (f"POST /api/models/{MODEL}/commit/([^/]+)", "commit"),
    (f"GET /api/models/{MODEL}/tree/([^/]+)(/.*)?", "tree"),
    (rf"POST /{MODEL}\.git/info/lfs/objects/batch", "batch"),
    (f"POST /{MODEL}/verify", "verify"),
    (r"PUT /storage/(\w+)", "store"),
    (r"(?:GET|HEAD) /storage/(\w+)", "stored"),
    (f"(?:GET|HEAD) /{MODEL}/resolve/([^/]+)/(.+)", "resolve"),
]
