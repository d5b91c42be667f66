"""A server that speaks the hub's protocol over folders: listings, files in ranges, refusals."""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A folder for each revision; `gated` and `private` ask for the token, `cut` breaks a file's
    first answer off after so many bytes.
    """

    revisions: dict[str, Path]
    token: str = ""
    gated: bool = False
    private: bool = False
    cut: dict[str, int] = field(default_factory=dict)


@dataclass
class Hub:
    """The repositories by id, and what was asked: (method, path, range)."""

    repositories: dict[str, Repository]
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    address: str = ""

    def files_sent(self) -> set[str]:
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}


@contextmanager
def serving(hub: Hub):
    class Handler(Answers):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        actual = self.hub.repositories.get(name)
        allowed = actual and self.headers.get("Authorization") == f"Bearer {actual.token}"
        if actual is None or (actual.private and not allowed):
            return self.refuse(401 if actual else 404, "RepoNotFound")
        what, asked = (parts[2:4] + ["revision", "main"])[:2] if len(parts) > 3 else ("", "main")
        revision = next((r for r in actual.revisions if asked in (r, commit(name + r))), None)
        if revision is None:
            return self.refuse(404, "RevisionNotFound")
        folder, sha = actual.revisions[revision], commit(name + revision)
        if what == "tree":
            return self.send(json.dumps([self.entry(folder, file) for file in files(folder)]))
        if what != "resolve":
            siblings = [
                {"rfilename": f, "size": (folder / f).stat().st_size} for f in files(folder)
            ]
            return self.send(json.dumps({"id": name, "sha": sha, "siblings": siblings}))
        if actual.gated and not allowed:
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        return self.send_file(actual, folder, "/".join(parts[4:]), sha)

    @staticmethod
    def entry(folder, file):
        size = (folder / file).stat().st_size
        return {"type": "file", "path": file, "size": size, "oid": commit(file)}

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, text):
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, repository, folder, name, sha):
        if not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        data = (folder / name).read_bytes()
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command == "GET":
            end = repository.cut.pop(name, len(data))
            self.wfile.write(data[begin:end])
            if end < len(data):
                self.close_connection = True


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
