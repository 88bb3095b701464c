"""What the Hub answers: Hugging Face's wire format, for repositories held in memory."""

import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

Files = Mapping[str, bytes]
# Git LFS on the Hub: these files, and whatever is large.
_LARGE = (".safetensors", ".bin", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".model")
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info|refs)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"
)
_CACHE = re.compile(
    r"/api/resolve-cache/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<rev>[^/]+)/(?P<path>.+)"
)


@dataclass
class Repository:
    """A model or data set: files by commit, and which branches and tags lead there."""

    name: str
    kind: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    members: set[str] = field(default_factory=set)

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or (full or short) hash."""
        known = self.refs.get(revision) or self.tags.get(revision)
        if known is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            known = next((sha for sha in self.commits if sha.startswith(revision)), None)
        return known


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes = b""


class HubAnswers:
    """The repositories of a Hub, and what it answers to a request.

    Attributes:
        tokens: All valid tokens.
        storage_url: Address of the host that LFS files come from.
    """

    def __init__(self) -> None:
        self.tokens: set[str] = set()
        self.storage_url = ""
        self.repositories: dict[tuple[str, str], Repository] = {}

    def named(self, name: str) -> list[Repository]:
        found = [one for (_, other), one in self.repositories.items() if other == name]
        if not found:
            raise KeyError(name)
        return found

    def commit(self, kind: str, name: str, files: Path | Files, branch: str) -> str:
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault((kind, name), Repository(name, kind))
        names = [f"{path} {hashlib.sha1(content).hexdigest()}" for path, content in files.items()]
        text = "\n".join([kind, name, branch, str(len(repository.commits)), *names])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def answer_storage(self, path: str, token: str | None, _body: bytes) -> Answer:
        """Answer as the storage behind LFS files: by checksum, and never to a request with a token.

        The real one refuses a second authorization beside the signature in the address.
        """
        wanted = path.strip("/")
        if token is not None:
            return Answer(400, {}, b"Only one auth mechanism allowed")
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == wanted:
                        return Answer(200, {"ETag": f'"{wanted}"'}, content)
        return Answer(404, {})

    def answer(self, path: str, token: str | None, body: bytes) -> Answer:
        address = urllib.parse.urlsplit(path)
        if token is not None and token not in self.tokens:
            text = "Invalid credentials in Authorization header"
            return error(401, "", text)
        if address.path == "/api/whoami-v2":
            return _json({"type": "user", "name": "user"}) if token else error(401, "", "")
        match = next((m for r in (_CACHE, _FILE, _API) if (m := r.fullmatch(address.path))), None)
        if match is None:
            return error(404, "", "Not found")
        kind = (match["kind"] or "models").strip("/")
        name = urllib.parse.unquote(match["name"])
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and token not in repository.members):
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        query = urllib.parse.parse_qs(address.query)
        if match.re is _API:
            return self._answer_info(repository, match, query, body)
        if repository.gated and token not in repository.members:
            return _gated(repository, token)
        rev, file = urllib.parse.unquote(match["rev"]), urllib.parse.unquote(match["path"])
        return self._answer_file(repository, rev, file, cached=match.re is _CACHE)

    def _answer_file(self, one: Repository, revision: str, path: str, *, cached: bool) -> Answer:
        commit = one.find(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        content = one.commits[commit].get(path)
        if content is None:
            return error(404, "EntryNotFound", "Entry not found", headers)
        if _is_large(path, content):
            checksum = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{checksum}"'}
            return Answer(302, headers | {"Location": f"{self.storage_url}/{checksum}"})
        headers["ETag"] = f'"{_git_hash(content)}"'
        if cached:
            return Answer(200, headers | {"Content-Type": "text/plain; charset=utf-8"}, content)
        quoted = urllib.parse.quote(path)
        there = f"/api/resolve-cache/{one.kind}/{one.name}/{commit}/{quoted}"
        return Answer(307, headers | {"Location": there})

    def _answer_info(
        self, one: Repository, match: re.Match[str], query: Mapping[str, Any], body: bytes
    ) -> Answer:
        what, revision = match["what"], urllib.parse.unquote(match["revision"] or "main")
        if what == "refs":
            return _json(
                {
                    "branches": [_ref("heads", name, sha) for name, sha in one.refs.items()],
                    "converts": [],
                    "tags": [_ref("tags", name, sha) for name, sha in one.tags.items()],
                }
            )
        commit = one.find(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = one.commits[commit]
        if what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode())
            return _json(_entries(files, "", recursive=True, only=asked.get("paths", [])))
        if what == "tree":
            folder = urllib.parse.unquote(match["path"] or "")
            inside = not folder or any(path.startswith(f"{folder}/") for path in files)
            if not inside:
                return error(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return _json(_entries(files, folder, recursive=recursive))
        details = {"id": one.name, "modelId": one.name, "author": one.name.split("/")[0]}
        siblings = [{"rfilename": path} for path in files]
        if query.get("blobs"):
            siblings = [
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                for entry in _entries(files, "", recursive=True)
                if entry["type"] == "file"
            ]
        return _json(
            details
            | {"sha": commit, "siblings": siblings, "private": one.private, "disabled": False}
            | {"gated": "manual" if one.gated else False, "tags": [], "downloads": 0, "likes": 0}
            | {"lastModified": "2025-01-02T03:04:05.000Z", "createdAt": "2025-01-02T03:04:05.000Z"}
        )


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str, content: bytes) -> bool:
    return path.endswith(_LARGE) or len(content) > 10 * 2**20


def _ref(kind: str, name: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}


def _entries(
    files: Files, folder: str, *, recursive: bool, only: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return files and folders below `folder`, or those among `only`, as the tree API does."""
    found: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        for parent in PurePosixPath(path).parents:
            if str(parent) != ".":
                oid = hashlib.sha1(str(parent).encode()).hexdigest()
                entry = {"type": "directory", "oid": oid, "size": 0, "path": str(parent)}
                found[str(parent)] = entry
        entry = {"type": "file", "oid": _git_hash(content), "size": len(content), "path": path}
        if _is_large(path, content):
            checksum = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": checksum, "size": len(content), "pointerSize": 130}
        found[path] = entry
    if only is not None:
        return [found[path] for path in only if path in found]
    parent = folder or "."
    return [
        entry
        for path, entry in sorted(found.items())
        if (str(PurePosixPath(path).parent) == parent)
        or (recursive and (not folder or path.startswith(f"{folder}/")))
    ]


def _json(value: Any) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def error(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    given = {"X-Error-Code": code, "X-Error-Message": text}
    content = json.dumps({"error": text}).encode()
    known = {name: value for name, value in given.items() if value}
    return Answer(status, {"Content-Type": "application/json", **known, **(headers or {})}, content)


def _gated(one: Repository, token: str | None) -> Answer:
    place = f"{'' if one.kind == 'models' else 'datasets/'}{one.name}"
    text = f"Access to {one.kind[:-1]} {one.name} is restricted"
    if token is None:
        return error(401, "GatedRepo", f"{text}. You must have access to it and be authenticated")
    visit = f"Visit https://huggingface.co/{place} to ask for access."
    return error(403, "GatedRepo", f"{text} and you are not in the authorized list. {visit}")
