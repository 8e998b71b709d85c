"""A server on the loopback that speaks the hub's file interface, for tests through the real client.

It answers what `huggingface_hub` asks for to read files: a repository's commit, the listing of its tree, and each file
with its ETag, its commit and ranges. As on the hub, text is served as it is; other files are redirected to another
host, and the redirect carries their size and SHA-256.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

PREFIXES = {"dataset": "datasets/", "model": ""}


class Request(NamedTuple):
    """What the client asked for; `range` is the Range header, empty without one."""

    method: str
    path: str
    range: str


@dataclass(frozen=True)
class Repository:
    """One commit of a repository: its files by path."""

    kind: str
    name: str
    files: Mapping[str, bytes]

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(f"{self.kind}:{self.name}".encode())
        for path, data in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def info(self) -> dict:
        siblings = [{"rfilename": path, "size": len(data), **large_file(data)} for path, data in self.files.items()]
        return {"id": self.name, "sha": self.commit, "private": False, "tags": [], "siblings": siblings}

    def tree(self, under: str) -> list[dict]:
        """Every file below a folder, as the recursive listing gives it."""
        return [
            {"type": "file", "path": path, "size": len(data), "oid": git_hash(data), **large_file(data)}
            for path, data in self.files.items()
            if path.startswith(f"{under}/" if under else "")
        ]


@dataclass
class HubServer:
    """The repositories of a hub on this machine; use as a context manager.

    Attributes:
        requests: all that was asked, in order.
        cache: where the fixture `hub` lets what is fetched lie.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cache: Path | None = None
    _drops: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, files: Mapping[str, bytes | Path], *, kind: str = "dataset") -> str:
        """Serve a repository, `ORG/NAME` with files by path, in place of an earlier one of that name; its commit."""
        contents = {path: data.read_bytes() if isinstance(data, Path) else data for path, data in files.items()}
        repository = self.repositories[kind, name] = Repository(kind, name, contents)
        return repository.commit

    def drop_once(self, path: str, after: int) -> None:
        """Break the connection after so many bytes of a file, the next time it is sent from its start."""
        self._drops[path] = after

    def downloads(self, path: str) -> list[Request]:
        """The requests for a file's bytes, those that were redirected left out."""
        places = {
            f"/cdn/{sha256(data)}"
            if large_file(data)
            else f"/{PREFIXES[kind]}{name}/resolve/{repository.commit}/{path}"
            for (kind, name), repository in self.repositories.items()
            if (data := repository.files.get(path)) is not None
        }
        return [request for request in self.requests if request.method == "GET" and request.path in places]

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables under which a process uses this hub and keeps what it fetches under `cache`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_ASSETS_CACHE": str(cache / "assets"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def file_host(self) -> str:
        """Where large files lie: for the client another host than `url`."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bytes_of(self, digest: str) -> tuple[str, bytes] | None:
        """(path, bytes) of the large file with a SHA-256."""
        for repository in self.repositories.values():
            for path, data in repository.files.items():
                if sha256(data) == digest:
                    return path, data
        return None

    def drop_after(self, path: str) -> int | None:
        return self._drops.pop(path, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[0] == "cdn" and (found := self.hub.bytes_of(parts[-1])) is not None:
            return self._send_file(*found, {"ETag": f'"{parts[-1]}"'})
        if parts[0] == "api" and len(parts) >= 4:
            repository = self.hub.repositories.get((parts[1].removesuffix("s"), "/".join(parts[2:4])))
            if repository is None:
                return self._missing("RepoNotFound")
            if parts[4:5] == ["tree"]:
                return self._send_json(repository.tree("/".join(parts[6:])))
            return self._send_json(repository.info())
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[kind == "dataset" :]  # ORG, NAME, "resolve", the revision, and the file's path
        repository = self.hub.repositories.get((kind, "/".join(parts[:2])))
        file = "/".join(parts[4:])
        if repository is None or parts[2:3] != ["resolve"]:
            return self._missing("RepoNotFound")
        if file not in repository.files:
            return self._missing("EntryNotFound", repository.commit)
        data = repository.files[file]
        if large_file(data):
            return self._redirect(data, repository.commit)
        return self._send_file(file, data, {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": repository.commit})

    def _redirect(self, data: bytes, commit: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.hub.file_host}/cdn/{sha256(data)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{sha256(data)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = data[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        after = self.hub.drop_after(path) if start == 0 else None
        self.wfile.write(body if after is None else body[:after])
        if after is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _missing(self, code: str, commit: str = "") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def large_file(data: bytes) -> dict:
    """The listing's entry of a file in Git LFS; empty for a text file, which Git holds itself."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        # The listing of a tree says `oid`, the description of a repository `sha256`.
        return {"lfs": {"oid": sha256(data), "sha256": sha256(data), "size": len(data), "pointerSize": 130}}
    return {}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    """Git's name of a file with this content."""
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()
