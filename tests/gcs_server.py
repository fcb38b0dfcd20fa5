"""A Google Cloud Storage server on loopback, with faults to order.

gcp-storage-emulator does the protocol. What it lacks is added here: several requests at once,
generation preconditions, a record of every object ever made, and faults. As a program it serves one
bucket until it is killed, and prints its address first:

    python tests/gcs_server.py BUCKET
"""

import contextlib
import io
import json
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

CONFLICT = {"error": {"code": 412, "message": "At least one pre-condition did not hold."}}


@dataclass
class Request:
    """kind: list, get, read, delete, multipart (a small object in one request), start or chunk (of
    a resumable upload). name: of the object. last: the chunk that ends an upload."""

    kind: str
    name: str
    last: bool = False


@dataclass
class Fault:
    """What happens to the next `times` requests that `when` holds for.

    action: an HTTP status, or one with the message and the reason of the reply; `reset` before the
    request is read, `midway` through its body; `stall` until the server closes; `lost`: done, but
    the connection breaks before the reply; `short`: part of a chunk is kept; `vanish`: the upload
    session is gone, 410.
    """

    action: int | str | tuple[int, str, str]
    when: Callable[[Request], bool] = lambda request: True
    times: float = 1
    seen: list[Request] = field(default_factory=list)


class PreconditionFailed(Exception):
    pass


class RecordingStorage(Storage):
    """Refuses what a generation precondition forbids; remembers what was ever made."""

    def __init__(self):
        super().__init__(use_memory_fs=True, data_dir="/")
        self.expected: int | None = None  # of the request at hand
        self.history: dict[str, list[dict]] = {}

    def check(self, bucket, name):
        there = self.objects.get(bucket, {}).get(name)
        if self.expected is not None and self.expected != int((there or {}).get("generation", 0)):
            raise PreconditionFailed

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        self.check(bucket_name, file_name)
        super().create_file(bucket_name, file_name, content, file_obj, file_id)
        self.history.setdefault(file_name, []).append(dict(file_obj))

    def create_resumable_upload(self, bucket_name, file_name, file_obj):
        self.check(bucket_name, file_name)
        return super().create_resumable_upload(bucket_name, file_name, file_obj)

    def _write_config_to_file(self):
        pass  # all of it again with every object


class Handler(RequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server, *args):
        self.gcs = server
        super().__init__(server.storage, *args)

    def log_message(self, format, *args):
        pass

    def _request(self, method: str, body: bytes) -> Request:
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        name = urllib.parse.unquote(url.path.partition("/o/")[2])
        if "/upload/" not in self.path:
            kinds = {"DELETE": "delete", "GET": "get" if name else "list"}
            read = "/download/" in self.path or query.get("alt") == ["media"]
            return Request("read" if read and name else kinds.get(method, method), name)
        if "upload_id" in query:
            session = self.storage.resumable.get(query["upload_id"][0], {})
            start, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
            last = start.endswith(f"-{int(total) - 1}") if total.isdigit() else False
            return Request("chunk", session.get("name", ""), last)
        if query["uploadType"] == ["resumable"]:
            return Request("start", json.loads(body)["name"])
        meta = body[body.index(b"{") : body.index(b"}\r\n--") + 1]
        return Request("multipart", json.loads(meta)["name"])

    def _handle(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if fault := self.gcs.take(Request("any", ""), ("reset",)):
            return self._break()
        if fault := self.gcs.take(Request("any", ""), ("midway",), length > 1 << 16):
            self.rfile.read(length // 2)
            return self._break()
        body = self.rfile.read(length)
        with self.gcs.lock:
            request = self._request(method, body)
            self.gcs.requests.append(request)
            fault = self.gcs.take(request)
        action = fault.action if fault else None
        if isinstance(action, int):
            action = (action, "a fault to order", "")
        if isinstance(action, tuple):
            code, message, reason = action
            errors = [{"message": message, "domain": "global", "reason": reason}]
            error = {"code": code, "message": message, "errors": errors}
            return self._reply(code, {"error": error})
        if action == "stall":
            self.gcs.closing.wait()
            return self._break()
        if action == "short":
            kept = (len(body) // 2) >> 18 << 18
            body = body[:kept]
            start, total = self.headers["Content-Range"].removeprefix("bytes ").split("/")
            first = int(start.split("-")[0])
            self.headers.replace_header(
                "Content-Range", f"bytes {first}-{first + kept - 1}/{total}"
            )
            self.headers.replace_header("Content-Length", str(kept))
        self.rfile, wire = io.BytesIO(body), self.rfile
        reply, self.wfile = self.wfile, io.BytesIO()
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        with self.gcs.lock:
            if action == "vanish":
                self.storage.resumable.pop(query["upload_id"][0], None)
            expected = query.get("ifGenerationMatch")
            self.storage.expected = int(expected[0]) if expected else None
            try:
                if request.kind == "read":
                    self.storage.check(self.gcs.bucket, request.name)
                Router(self).handle(method)
            except PreconditionFailed:
                self.wfile = io.BytesIO()
                self._reply(412, CONFLICT)
        answer, self.rfile, self.wfile = self.wfile.getvalue(), wire, reply
        if action == "lost":
            return self._break()
        if action == "vanish":
            return self._reply(410, {"error": {"code": 410, "message": "gone"}})
        if self.gcs.latency:
            time.sleep(self.gcs.latency)
        self.wfile.write(answer)

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _break(self) -> None:
        """RST in place of a reply."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    do_GET = lambda self: self._handle("GET")  # noqa: E731
    do_POST = lambda self: self._handle("POST")  # noqa: E731
    do_PUT = lambda self: self._handle("PUT")  # noqa: E731
    do_DELETE = lambda self: self._handle("DELETE")  # noqa: E731
    do_PATCH = lambda self: self._handle("PATCH")  # noqa: E731

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # of a connection that was broken
            super().finish()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError | ValueError | OSError):
            super().handle_error(request, client_address)


class GcsServer:
    """Serves `bucket` at `url` until `close`.

    requests: all that came, in order. latency: seconds before each reply.
    """

    def __init__(self, bucket: str = "bucket"):
        self.bucket, self.storage = bucket, RecordingStorage()
        create_bucket(bucket, self.storage)
        self.lock, self.closing = threading.RLock(), threading.Event()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.latency = 0.0
        self._http = _Http(("127.0.0.1", 0), lambda *args: Handler(self, *args))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def fault(self, action, when=lambda request: True, times: float = 1) -> Fault:
        with self.lock:
            self.faults.append(Fault(action, when, times))
            return self.faults[-1]

    def recover(self) -> None:
        """From here on without faults; connections that stall are broken."""
        self.faults.clear()
        self.closing.set()
        time.sleep(0.1)
        self.closing.clear()

    def take(self, request, only=(), condition=True) -> Fault | None:
        """The first fault that is meant for this request; of those before it is read, `only`."""
        early = ("reset", "midway")
        with self.lock:
            for fault in self.faults:
                fits = (fault.action in only) if only else fault.action not in early
                if fits and condition and fault.times > 0 and (only or fault.when(request)):
                    fault.times -= 1
                    fault.seen.append(request)
                    return fault
        return None

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Name below the prefix -> content."""
        with self.lock:
            return {
                name.removeprefix(prefix): self.storage.get_file(self.bucket, name)
                for name in sorted(self.storage.objects.get(self.bucket, {}))
                if name.startswith(prefix)
            }

    def store(self, name: str, content: bytes) -> None:
        """Puts an object there, in place of any other."""
        client = Client(
            credentials=AnonymousCredentials(), client_options={"api_endpoint": self.url}
        )
        client.bucket(self.bucket).blob(name).upload_from_string(content)

    def generations(self, name: str) -> list[dict]:
        """Every object that the name has ever stood for."""
        return self.storage.history.get(name, [])

    def corrupt(self, name: str) -> None:
        path = self.storage._object_path(self.bucket, name)
        content = self.storage._store.read_bytes(path)
        self.storage._store.write_bytes(
            path, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        )

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


if __name__ == "__main__":
    print(GcsServer(sys.argv[1]).url, flush=True)
    threading.Event().wait()
