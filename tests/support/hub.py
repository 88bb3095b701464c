"""A Hub on loopback that speaks Hugging Face's wire format, with faults.

```python
def test_x(hub: Hub) -> None:                         # the fixture is in conftest.py
    commit = hub.model("user/tiny", folder)           # a commit on main; again: another commit
    hub.dataset("user/rows", {"rows.jsonl": b"{}"})
    hub.fail(429, times=1, when="GET .*config.json", headers={"Retry-After": "7"})
    load("user/tiny")                                 # through huggingface_hub, as ever
    assert hub.pauses == [8.0]                        # what the client would have slept
```

It answers what huggingface_hub, transformers and datasets ask for when they read: repository and
revision info, tree, paths-info, refs, and resolve. As on the real Hub, resolve redirects small
files to /api/resolve-cache and large ones (Git LFS) to another host, here another port, that takes
no token. Names have two parts, user/name.
"""

import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.hub_answers import Answer, Files, HubAnswers, error
from support.servers import LoopbackHandler


@dataclass
class _Fault:
    """A change to the next `times` requests whose text, METHOD /path?query RANGE, has `when`."""

    kind: str
    when: re.Pattern[str]
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class Hub:
    """The Hub, as seen by a test.

    Attributes:
        url: Its address, for `HF_ENDPOINT`.
        requests: Text of every request so far, METHOD /path?query RANGE, with the fault it met.
        pauses: Seconds that clients in this process wanted to wait before a retry.
        tokens: All valid tokens; `gate` and `hide` add theirs.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.pauses: list[float] = []
        self._content = HubAnswers()
        self.tokens = self._content.tokens
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, answer))
            for answer in (self._content.answer, self._content.answer_storage)
        ]
        self.url, self._content.storage_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def model(self, name: str, files: Path | Files, branch: str = "main") -> str:
        """Commit a folder (or files by name) as a model's whole content; return the commit."""
        return self._content.commit("models", name, files, branch)

    def dataset(self, name: str, files: Path | Files, branch: str = "main") -> str:
        """Commit a folder (or files by name) as a data set's whole content; return the commit."""
        return self._content.commit("datasets", name, files, branch)

    def tag(self, name: str, tag: str, commit: str) -> None:
        """Name a commit."""
        for repository in self._content.named(name):
            repository.tags[tag] = commit

    def gate(self, name: str, *members: str) -> None:
        """Let only these tokens read files; as on the Hub, everyone sees their names."""
        for repository in self._content.named(name):
            repository.gated, repository.members = True, set(members)
        self.tokens |= set(members)

    def hide(self, name: str, *members: str) -> None:
        """Make it private: only these tokens see that it exists."""
        for repository in self._content.named(name):
            repository.private, repository.members = True, set(members)
        self.tokens |= set(members)

    def fail(
        self, status: int, times: int = 1, when: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with an error, such as 429 with {"Retry-After": "1"} or 503."""
        self._add("fail", when, times, status=status, headers=headers or {})

    def refuse(self, times: int = 1, when: str = "") -> None:
        """Close the connection without an answer."""
        self._add("refuse", when, times)

    def cut(self, times: int = 1, when: str = "") -> None:
        """Send half of the answer's body and close the connection."""
        self._add("cut", when, times)

    def heal(self) -> None:
        """Forget faults that have not occurred yet."""
        with self._lock:
            self._faults.clear()

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the variables that make another process use this Hub.

        Args:
            cache: Its folder for downloads, settings and tokens.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def close(self) -> None:
        """Stop the servers."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _add(self, kind: str, when: str, times: int, **details: Any) -> None:
        with self._lock:
            self._faults.append(_Fault(kind, re.compile(when), times, **details))

    def take_fault(self, text: str) -> _Fault | None:
        """Return the fault for a request, for the handler, and log the request."""
        with self._lock:
            fault = next((f for f in self._faults if f.times and f.when.search(text)), None)
            if fault is not None:
                fault.times -= 1
            self.requests.append(f"{text} [{fault.kind}]" if fault else text)
            return fault


def _handler(hub: Hub, answer: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(LoopbackHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = f" {given}" if (given := self.headers.get("Range")) else ""
            fault = hub.take_fault(f"{self.command} {urllib.parse.unquote(self.path)}{asked}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            if fault and fault.kind == "refuse":
                self.hang_up()
                return
            if fault and fault.kind == "fail":
                found = error(fault.status, "", "told to fail", fault.headers)
            else:
                found = self._part(answer(self.path, token, body))
            size = len(found.content)
            self._send(found, size // 2 if fault and fault.kind == "cut" else size)
            if fault and fault.kind == "cut":
                self.hang_up()

        do_GET = do_HEAD = do_POST = handle_any  # noqa: N815

        def _part(self, found: Answer) -> Answer:
            """Return the bytes that the Range header asks for, from a start or the last ones."""
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if found.status != 200 or self.command == "HEAD" or asked is None:
                return found
            size = len(found.content)
            first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            if first > last:
                return Answer(416, {"Content-Range": f"bytes */{size}"})
            headers = found.headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
            return Answer(206, headers, found.content[first : last + 1])

        def _send(self, found: Answer, sent: int) -> None:
            self.send_response_only(found.status)
            headers = {"Date": formatdate(usegmt=True), "X-Request-Id": "Root=1-test"}
            for name, value in (headers | found.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(found.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.content[:sent])
            self.wfile.flush()

    return Handler


def go_offline(patch: pytest.MonkeyPatch, *, offline: bool = True) -> None:
    """Do in this process what HF_HUB_OFFLINE=1 (or 0) does before the libraries are imported."""
    import datasets
    from huggingface_hub import constants

    patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        patch.setattr(datasets.config, name, offline)


class _Clock:
    """The module `time`, except that nobody waits."""

    def __init__(self, pauses: list[float]) -> None:
        self.sleep = pauses.append

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextmanager
def running_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub that this process and its children use instead of Hugging Face's.

    Args:
        cache: Folder for downloads; empty, so that nothing is cached.
        patch: Points the libraries there, which have read their environment already; undo it
            afterwards.
    """
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants, file_download, hf_api, utils
    from huggingface_hub.hf_file_system import HfFileSystem

    hub = Hub()
    try:
        for name, value in hub.environment(cache).items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(cache / "harnesses.json"),
        }.items():
            patch.setattr(constants, name, value, raising=False)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        # What a broken download keeps; less than a whole file of a test.
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**10)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        if hasattr(http, "_HUB_ORIGINS"):  # since 2.0; these get the token
            patch.setattr(http, "_HUB_ORIGINS", http._HUB_ORIGINS | {http._url_origin(hub.url)})
        for module in (http, file_download):
            patch.setattr(module, "time", _Clock(hub.pauses))
        _point_datasets(hub, cache, patch)
        go_offline(patch, offline=False)
        utils.close_session()
        HfFileSystem.clear_instance_cache()  # instances keep listings and connections
        yield hub
    finally:
        utils.close_session()
        HfFileSystem.clear_instance_cache()
        hub.close()


def _point_datasets(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    import datasets

    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_CACHE_HOME": str(cache),
        "HF_DATASETS_CACHE": cache / "datasets",
        "DOWNLOADED_DATASETS_PATH": cache / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": cache / "datasets" / "downloads" / "extracted",
        # The parquet files that the Hub makes of a data set are on a host of another name.
        "USE_PARQUET_EXPORT": False,
    }.items():
        patch.setattr(datasets.config, name, value)
