"""A folder of a Google Cloud Storage bucket: listing, reading, and one file to one object, once.

An object is created under a generation precondition and with the checksum its file had when it was
sealed, so that whatever happens to requests and replies, an object is never replaced by chance, and
never holds other bytes than were meant. Knows nothing of shards, manifests or runs.

Follows https://cloud.google.com/storage/docs/request-preconditions and `.../retry-strategy`. Where
STORAGE_EMULATOR_HOST is set, that server is spoken to, without credentials. The client library is
imported when it is first needed.
"""

import functools
import io
import logging
import os
import random
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from utils.errors import UserError
from utils.store.errors import brief, code_of, explained, is_refusal, is_remote, retry, timed_out
from utils.store.local import checksum

SCHEME = "gs://"
CHUNK_BYTES = 8 << 20  # of a resumable upload
ONE_REQUEST_BYTES = 2 << 20  # a file up to this size is sent in one request
PREFLIGHT_SECONDS = 18
REQUEST_SECONDS = 30  # without an answer; doubled each time that it was too short
MAX_REQUEST_SECONDS = 300
MAX_PAUSE_SECONDS = 20

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Receipt:
    """What the server says of an object. crc32c: of its content, in base64."""

    uri: str
    size: int
    crc32c: str
    generation: int

    def holds(self, size: int, crc32c: str) -> bool:
        return (self.size, self.crc32c) == (size, crc32c)


class Stopped(Exception):
    """An upload was given up because its `stopping` was set."""


class NameTaken(UserError):
    """The object's name is taken by other content than that of the file."""


class Damaged(UserError):
    """A file does not hold what it held when it was sealed."""


def is_uri(path: str | Path) -> bool:
    """Whether `path` speaks of a bucket; pathlib leaves one slash of the two."""
    return str(path).startswith("gs:/")


def parse_uri(uri: str | Path, flag: str = "") -> tuple[str, str]:
    """`gs://bucket/some/prefix/` -> ("bucket", "some/prefix").

    flag: named in the UserError that is raised for anything else.
    """
    text = str(uri)
    if not text.startswith(SCHEME) and isinstance(uri, Path) and is_uri(uri):
        text = SCHEME + text.removeprefix("gs:/")
    where = f"{flag} {text}".strip()
    if not text.startswith(SCHEME):
        written = "that" if ":" in text else f"gs://{text.lstrip('/')}"
        raise UserError(f"{where} is not gs://BUCKET/PREFIX: write {written}")
    bucket, _, prefix = text.removeprefix(SCHEME).partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise UserError(
            f"{where}: {bucket!r} is no name of a bucket, which is lower-case letters, digits, "
            "dashes, underscores and dots: write gs://BUCKET/PREFIX"
        )
    prefix = prefix.removesuffix("/")
    parts = prefix.split("/")
    if prefix and ("" in parts or "." in parts or ".." in parts):
        raise UserError(
            f"{where}: a part of the prefix is empty, `.` or `..`: write gs://{bucket}/"
            + "/".join(part for part in parts if part.strip("."))
        )
    if not prefix.isprintable() or len(prefix.encode()) > 900 or parts[0] == ".well-known":
        raise UserError(f"{where}: a bucket takes no such prefix: choose a shorter, plainer one")
    return bucket, prefix


def _client() -> Any:
    return _client_of(os.environ.get("STORAGE_EMULATOR_HOST"))


@functools.cache
def _client_of(emulator: str | None) -> Any:
    from google.cloud import storage

    if emulator and not emulator.startswith(("http://", "https://")):
        raise UserError(f"STORAGE_EMULATOR_HOST is {emulator}: write http://{emulator}")
    return storage.Client(project=None)  # which only making and listing buckets needs


class BucketFolder:
    """The objects directly under a prefix of a bucket. For several threads at once.

    uri: `gs://bucket/prefix`. Raises UserError for what is none; talks to nobody before it is
    asked to.
    """

    def __init__(self, uri: str | Path, flag: str = ""):
        self.bucket_name, self.prefix = parse_uri(uri, flag)
        self.uri = f"{SCHEME}{self.bucket_name}/{self.prefix}".rstrip("/")
        self.token = secrets.token_hex(8)  # tells our own objects from equal ones of others
        self._doing = "reach"
        self.num_chunks = 0  # begun to be sent: a sign of progress

    def __str__(self) -> str:
        return self.uri

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    # ----------------------------------------------------------------------------- reading

    def names(self) -> list[str]:
        """Of the objects directly under the prefix. Raises UserError, as all that read do."""
        return sorted(self.listing())

    def listing(self, seconds: float = 15) -> dict[str, Receipt]:
        """Name -> receipt of every object directly under the prefix."""
        return self._ask("list", lambda: self._listing(seconds))

    def _listing(self, seconds: float, timeout: float = REQUEST_SECONDS) -> dict[str, Receipt]:
        start = f"{self.prefix}/" if self.prefix else ""
        blobs = _client().list_blobs(
            self.bucket_name,
            prefix=start or None,
            delimiter="/",
            fields="items(name,size,crc32c,generation),nextPageToken",
            timeout=timeout,
            retry=retry(seconds),
        )
        found = {blob.name.removeprefix(start): self._receipt(blob) for blob in blobs}
        found.pop("", None)  # what some tools make to stand for a folder
        return found

    def read(self, name: str) -> bytes:
        """The content of a small object, as the server checksums it."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """The content of an object, fetched to a temporary file that ends with its handle."""
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.save(name, file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def save(self, name: str, file: BinaryIO) -> None:
        """Writes the content of an object to `file`. Raises UserError."""
        blob = self._blob(name)
        blob.chunk_size = None  # in one stream, taken up again where it breaks

        def download() -> None:
            blob.download_to_file(
                file,
                raw_download=True,
                checksum="crc32c",
                timeout=REQUEST_SECONDS,
                retry=retry(60),
            )

        self._ask("read", download, name)

    def find(self, name: str) -> tuple[Receipt, str] | None:
        """An object's receipt and the token of who made it; None where there is none. Raises the
        library's errors."""
        blob = _client().bucket(self.bucket_name).get_blob(
            self._object(name), timeout=REQUEST_SECONDS, retry=retry(60)
        )  # fmt: skip
        return (self._receipt(blob), (blob.metadata or {}).get("token", "")) if blob else None

    # ----------------------------------------------------------------------------- writing

    def check_access(self) -> dict[str, Receipt]:
        """The listing, once it is sure that objects can be listed, written, read and deleted here.

        Leaves nothing. Raises UserError within 20 seconds.
        """

        def late() -> UserError:
            return UserError(
                f"{self.uri} does not answer within {PREFLIGHT_SECONDS} s (trying to {self._doing} "
                "it): check the network, and the address where STORAGE_EMULATOR_HOST is set"
            )

        return within(PREFLIGHT_SECONDS, self._probe, late)

    def _probe(self) -> dict[str, Receipt]:
        name, content = f".arc-probe-{secrets.token_hex(4)}", secrets.token_bytes(16)
        quick = {"timeout": 5, "retry": retry(PREFLIGHT_SECONDS - 4)}
        self._ask("ask for credentials to", _client)
        found = self._ask("list", lambda: self._listing(PREFLIGHT_SECONDS - 4, 5))

        def write() -> None:
            try:
                self._blob(name).upload_from_string(content, if_generation_match=0, **quick)
            except Exception as error:  # not when an earlier reply was lost: it is there
                if code_of(error) != 412:
                    raise

        self._ask("write to", write)
        if self._ask("read from", lambda: self._blob(name).download_as_bytes(**quick)) != content:
            raise UserError(f"{self.uri} gives back other bytes than were written there")

        def delete() -> None:
            try:
                self._blob(name).delete(**quick)
            except Exception as error:
                if code_of(error) != 404:
                    raise

        self._ask("delete or replace objects in", delete)
        found.pop(name, None)
        return {n: r for n, r in found.items() if not n.startswith(".arc-probe-")}

    def put(
        self,
        source: Path | bytes,
        name: str,
        size: int,
        crc32c: str,
        *,
        replaces: int = 0,
        exclusive: bool = False,
        stopping: threading.Event,
        trouble: Callable[[str], None] = log.debug,
    ) -> Receipt:
        """Sends the first `size` bytes of `source`, whose checksum is `crc32c`, to the object
        `name`, and returns what the server then holds.

        Tries for as long as the server or the way to it fails; after each failure the object is
        looked up, which tells whether it arrived all the same, or was there before.

        replaces: the generation that the object has, 0 for an object that is not there.
        exclusive: an equal object that somebody else has made does not count as sent.
        trouble: told the cause of each failure.

        Raises UserError: NameTaken, Damaged, or what else cannot be cured by trying again. Raises
        Stopped once `stopping` is set.
        """

        def again(cause: str) -> None:
            if stopping.is_set():
                raise Stopped(name)
            trouble(cause)

        pauses = timeouts = 0
        while not stopping.is_set():
            found, cause = None, None
            try:
                receipt = self._send(source, name, size, crc32c, replaces, timeouts, again)
                if receipt.holds(size, crc32c):
                    return receipt
            except Stopped:
                raise
            except Exception as error:
                cause = error
                self._raise_if_hopeless(error, "write to", name)
            try:
                found = self.find(name)
                if found is None and code_of(cause) == 404:
                    self._check_bucket()  # a session may vanish, but not the bucket
            except Exception as error:
                self._raise_if_hopeless(error, "read", name)
                cause = cause or error
            if found:
                receipt, token = found
                if receipt.holds(size, crc32c) and (not exclusive or token == self.token):
                    return receipt
                if receipt.generation != replaces:
                    raise self._taken(receipt, source, name, crc32c)
            if code_of(cause) == 412 and found is None and replaces:
                raise UserError(
                    f"{self.uri_of(name)} was deleted during this run: --resume puts it back",
                    exit_code=1,
                )
            if code_of(cause) == 400:
                self._check_undamaged(source, name, size, crc32c)
            trouble(brief(cause) if cause else f"{name} did not arrive")
            timeouts += timed_out(cause)
            stopping.wait(min(MAX_PAUSE_SECONDS, 0.5 * 2**pauses) * random.uniform(0.5, 1))
            pauses = min(pauses + 1, 10)
        raise Stopped(name)

    def _taken(self, there: Receipt, source: Path | bytes, name: str, crc32c: str) -> NameTaken:
        return NameTaken(
            f"{there.uri} (crc32c {there.crc32c}, generation {there.generation}) is not what "
            f"{_local(source, name)} (crc32c {crc32c}) was to make there: another run writes under "
            "this prefix; nothing was replaced, choose another",
            exit_code=1,
        )

    def _check_bucket(self) -> None:
        try:
            blobs = _client().list_blobs(self.bucket_name, max_results=1, retry=retry(10))
            next(iter(blobs), None)
        except Exception as error:
            if code_of(error) == 404:
                raise self._explained(error, "write to") from error

    def _send(
        self,
        source: Path | bytes,
        name: str,
        size: int,
        crc32c: str,
        replaces: int,
        timeouts: int,
        trouble: Callable[[str], None],
    ) -> Receipt:
        blob = self._blob(name)
        # The server compares it with what arrives. With checksum="crc32c" the library would send
        # that of whatever the file holds by now.
        blob.crc32c = crc32c
        blob.metadata = {"token": self.token}
        in_chunks = size > ONE_REQUEST_BYTES and size != CHUNK_BYTES
        with opened(source) as file:
            if file.seek(0, os.SEEK_END) < size:
                self._check_undamaged(source, name, size, crc32c)
            file.seek(0)
            blob.upload_from_file(
                _Chunks(file, size, self._count_chunk) if in_chunks else file,
                # Up to 8 MiB the library takes one request, and several copies, if it knows it.
                size=None if in_chunks and size < CHUNK_BYTES else size,
                content_type="application/octet-stream",
                if_generation_match=replaces,
                checksum=None,
                timeout=min(REQUEST_SECONDS * 2**timeouts, MAX_REQUEST_SECONDS),
                retry=retry(120, trouble),
            )
        return self._receipt(blob)

    def _count_chunk(self) -> None:
        self.num_chunks += 1

    def _check_undamaged(self, source: Path | bytes, name: str, size: int, crc32c: str) -> None:
        with opened(source) as file:
            now = checksum(file, size)
            if now != crc32c:
                raise Damaged(
                    f"{_local(source, name)} is damaged: its crc32c is {now}, and was {crc32c}"
                    " when it was written; it was not uploaded",
                    exit_code=1,
                )

    def check_holds(self, name: str, size: int, crc32c: str) -> None:
        """Raises UserError unless the object is there, with that content."""
        found = self._ask("read", lambda: self.find(name), name)
        if found is None or not found[0].holds(size, crc32c):
            raise UserError(f"{self.uri_of(name)} is not what was uploaded", exit_code=1)

    # ------------------------------------------------------------------------------ errors

    def _ask(self, what: str, request: Callable[[], Result], name: str = "") -> Result:
        self._doing = what
        try:
            return request()
        except Exception as error:
            if isinstance(error, UserError) or not is_remote(error):
                raise
            raise self._explained(error, what, name) from error

    def _raise_if_hopeless(self, error: Exception, what: str, name: str) -> None:
        """Raises what trying again does not cure: a refusal in words, a local error as it is."""
        if isinstance(error, UserError):
            raise error
        if isinstance(error, OSError) and not is_remote(error):
            raise UserError(
                f"cannot read {error.filename or name}: {error.strerror}", exit_code=1
            ) from error
        if not is_remote(error):
            raise error
        if is_refusal(error):
            raise self._explained(error, what, name) from error

    def _explained(self, error: Exception, what: str, name: str = "") -> UserError:
        uri = self.uri_of(name) if name else self.uri
        return explained(error, what, self.bucket_name, uri, bool(name))

    # ------------------------------------------------------------------------------- names

    def _object(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _blob(self, name: str) -> Any:
        return _client().bucket(self.bucket_name).blob(self._object(name), chunk_size=CHUNK_BYTES)

    def _receipt(self, blob: Any) -> Receipt:
        uri = f"{SCHEME}{self.bucket_name}/{blob.name}"
        return Receipt(uri, int(blob.size), blob.crc32c, int(blob.generation))


class _Chunks:
    """The first `size` bytes of a file, in chunks that share one buffer, where the library would
    hold three of each upload."""

    def __init__(self, file: BinaryIO, size: int, read: Callable[[], None]):
        self._file, self._size, self._read = file, size, read
        self._buffer = bytearray(min(CHUNK_BYTES, size))
        self.tell = file.tell

    def read(self, size: int) -> memoryview:
        self._read()
        view = memoryview(self._buffer)[: min(size, self._size - self.tell())]
        return view[: self._file.readinto(view)]


def opened(source: Path | bytes) -> BinaryIO:
    """A file, or bytes, to read from."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _local(source: Path | bytes, name: str) -> str:
    return name if isinstance(source, bytes) else str(source)


def within(
    seconds: float,
    work: Callable[[], Result],
    late: Callable[[], BaseException],
    check: Callable[[], None] = lambda: None,
) -> Result:
    """What `work` returns or raises, in a thread that nobody waits for longer; then `late()`.

    check: called time and again; what it raises ends the wait.
    """
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome[:] = [work(), None]
        except BaseException as error:
            outcome[:] = [None, error]

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, 0.2))
        check()
    if not outcome:
        raise late()
    result, error = outcome
    if error is not None:
        raise error
    return result
