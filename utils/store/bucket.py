"""A folder of a Google Cloud Storage bucket: listing, reading, and one file to one object, once.

An object is created under a generation precondition and with the checksum its file had when it was
sealed, so that whatever happens to requests and replies, an object is never replaced by chance, and
never holds other bytes than were meant. Knows nothing of shards, manifests or runs.

Follows https://cloud.google.com/storage/docs/request-preconditions. Where STORAGE_EMULATOR_HOST is
set, that server is spoken to, without credentials. The library is imported when first needed.
"""

import contextlib
import functools
import io
import logging
import os
import random
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError
from utils.store.deadline import within
from utils.store.errors import brief, code_of, explained, is_refusal, is_remote, retry
from utils.store.local import checksum, scratch_file

SCHEME = "gs://"
CHUNK_BYTES = 8 << 20  # of an upload; what is not larger goes in one request
PREFLIGHT_SECONDS = 18
REQUEST_SECONDS = 30  # without an answer
MAX_PAUSE_SECONDS = 20

log = logging.getLogger(__name__)


def is_uri(path: str | Path) -> bool:
    """Whether `path` speaks of a bucket; pathlib leaves one slash of the two."""
    return str(path).startswith("gs:/")


def parse_uri(uri: str | Path, flag: str = "") -> tuple[str, str]:
    """`gs://bucket/some/prefix/` -> ("bucket", "some/prefix").

    flag: named in the UserError that is raised for anything else.
    """
    text = re.sub("^gs:/", SCHEME, str(uri)) if isinstance(uri, Path) else str(uri)
    where = f"{flag} {text}".strip()
    if not text.startswith(SCHEME):
        written = "that" if ":" in text else f"gs://{text.lstrip('/')}"
        raise UserError(f"{where} is not gs://BUCKET/PREFIX: write {written}")
    bucket, _, prefix = text.removeprefix(SCHEME).partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise UserError(
            f"{where}: {bucket!r} is no name of a bucket, which is at least three lower-case "
            "letters, digits, dashes, underscores and dots: write gs://BUCKET/PREFIX"
        )
    parts = (prefix := prefix.removesuffix("/")).split("/")
    if prefix and not {"", ".", ".."}.isdisjoint(parts):
        plain = "/".join(part for part in parts if part.strip("."))
        raise UserError(
            f"{where}: a part of the prefix is empty, `.` or `..`: write gs://{bucket}/{plain}"
        )
    if not prefix.isprintable() or len(prefix.encode()) > 900 or parts[0] == ".well-known":
        raise UserError(f"{where}: a bucket takes no such prefix: choose a shorter, plainer one")
    return bucket, prefix


class Stopped(Exception):
    """An upload was given up because its `stopping` was set."""


class NameTaken(UserError):
    """The object's name is taken by other content than that of the file."""


class Damaged(UserError):
    """A file does not hold what it held when it was sealed."""


@dataclass(frozen=True)
class Receipt:
    """What the server says of an object. crc32c: of its content, in base64."""

    uri: str
    size: int
    crc32c: str
    generation: int

    def holds(self, size: int, crc32c: str) -> bool:
        return (self.size, self.crc32c) == (size, crc32c)


@dataclass
class _Sealed:
    """The first `size` bytes of `source`, as they were when `crc32c` was taken of them, on their
    way to the object `name`; furthest: up to where they have been read for that."""

    source: Path | bytes
    name: str
    size: int
    crc32c: str
    furthest: int = 0

    def __str__(self) -> str:
        return self.name if isinstance(self.source, bytes) else str(self.source)

    def check_undamaged(self) -> None:
        """Raises Damaged."""
        with opened(self.source) as file:
            now = checksum(file, self.size)
        if now != self.crc32c:
            raise Damaged(
                f"{self} is damaged: its crc32c is {now}, and was {self.crc32c} when it was "
                "written; it was not uploaded",
                exit_code=1,
            )


def opened(source: Path | bytes) -> BinaryIO:
    """A file, or bytes, to read from."""
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _client() -> Any:
    return _client_of(os.environ.get("STORAGE_EMULATOR_HOST", ""))


@functools.cache
def _client_of(emulator: str) -> Any:
    from google.cloud import storage

    if emulator and not emulator.startswith(("http://", "https://")):
        raise UserError(f"STORAGE_EMULATOR_HOST is {emulator}: write http://{emulator}")
    return storage.Client(project=None)  # which only making and listing buckets needs


class BucketFolder:
    """The objects directly under a prefix of a bucket. For several threads at once.

    uri: `gs://bucket/prefix`. Raises UserError for what is none; talks to nobody before it is
    asked to. All that read raise UserError.
    """

    def __init__(self, uri: str | Path, flag: str = ""):
        self.bucket_name, self.prefix = parse_uri(uri, flag)
        self.uri = f"{SCHEME}{self.bucket_name}/{self.prefix}".rstrip("/")
        self.token = secrets.token_hex(8)  # tells our own objects from equal ones of others
        self.bytes_read = 0  # to be sent, of each file once: a sign of progress
        self._start = f"{self.prefix}/" if self.prefix else ""  # of the names of its objects
        self._doing = "reach"

    def __str__(self) -> str:
        return self.uri

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def names(self) -> list[str]:
        return sorted(self.listing())

    def listing(self, seconds: float = 15, timeout: float = REQUEST_SECONDS) -> dict[str, Receipt]:
        """Name -> receipt of every object directly under the prefix.

        seconds: for how long to try. timeout: seconds for each request.
        """
        with self._asking("list"):
            blobs = _client().list_blobs(
                self.bucket_name,
                prefix=self._start or None,
                delimiter="/",
                fields="items(name,size,crc32c,generation),nextPageToken",
                timeout=timeout,
                retry=retry(seconds),
            )
            found = {blob.name.removeprefix(self._start): self._receipt(blob) for blob in blobs}
        # The empty name is what some tools make to stand for a folder; `..` could be no file's, and
        # no name below the folder has a slash, whatever a server says.
        return {name: r for name, r in found.items() if name.strip(".") and "/" not in name}

    def read(self, name: str) -> bytes:
        """The content of a small object, as the server checksums it."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """The content of an object, fetched to a temporary file that ends with its handle."""
        with scratch_file(self.uri_of(name)) as file:
            self.save(name, file)
        return file

    def save(self, name: str, file: BinaryIO, generation: int | None = None) -> None:
        """Writes the content of an object, now or of that generation, to `file`."""
        with self._asking("read", name):
            blob = self._blob(name)
            blob.chunk_size = None  # in one stream, taken up again where it breaks
            blob.download_to_file(
                file,
                raw_download=True,
                checksum="crc32c",
                if_generation_match=generation,
                timeout=REQUEST_SECONDS,
                retry=retry(60),
            )

    def find(self, name: str) -> tuple[Receipt, str] | None:
        """An object's receipt and the token of who made it; None where there is none. Raises the
        library's errors."""
        bucket = _client().bucket(self.bucket_name)
        blob = bucket.get_blob(self._start + name, timeout=REQUEST_SECONDS, retry=retry(60))
        return (self._receipt(blob), (blob.metadata or {}).get("token", "")) if blob else None

    def check_holds(self, name: str, size: int, crc32c: str) -> None:
        """Raises UserError unless the object is there, with that content."""
        with self._asking("read", name):
            found = self.find(name)
        if found is None or not found[0].holds(size, crc32c):
            raise UserError(f"{self.uri_of(name)} is not what was uploaded", exit_code=1)

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

    def location(self) -> tuple[str, list[str]] | None:
        """Where it is, as `US-CENTRAL1` or `EU`, and the regions of a dual-region, or None."""
        try:
            bucket = _client().get_bucket(self.bucket_name, timeout=5, retry=None)
        except Exception as error:
            if is_remote(error):
                return None
            raise
        return (bucket.location, bucket.data_locations or []) if bucket.location else None

    def _probe(self) -> dict[str, Receipt]:
        name, content = f".arc-probe-{secrets.token_hex(4)}", secrets.token_bytes(16)
        quick = {"timeout": 5, "retry": retry(PREFLIGHT_SECONDS - 4)}
        with self._asking("ask for credentials to"):
            _client()
        found = self.listing(PREFLIGHT_SECONDS - 4, 5)
        with self._asking("write to", done=412):
            self._blob(name).upload_from_string(content, if_generation_match=0, **quick)
        with self._asking("read from"):
            same = self._blob(name).download_as_bytes(**quick) == content
        if not same:
            raise UserError(f"{self.uri} gives back other bytes than were written there")
        with self._asking("delete or replace objects in", done=404):
            self._blob(name).delete(**quick)
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

        def tell(cause: str) -> None:
            if stopping.is_set():
                raise Stopped(name)
            trouble(cause)

        file = _Sealed(source, name, size, crc32c)
        pause = 0.5
        while not stopping.is_set():
            found, cause, is_absent = None, None, False
            try:
                receipt = self._send(file, replaces, tell)
                if receipt.holds(size, crc32c):
                    return receipt
            except Exception as error:
                cause = error
                self._raise_if_hopeless(error, "write to", name)
            try:
                found = self.find(name)
                is_absent = found is None
            except Exception as error:
                self._raise_if_hopeless(error, "read", name)
                cause = cause or error
            if found:
                receipt, token = found
                if receipt.holds(size, crc32c) and (not exclusive or token == self.token):
                    return receipt
                if receipt.generation != replaces:
                    raise NameTaken(
                        f"{receipt.uri} (crc32c {receipt.crc32c}, generation {receipt.generation}) "
                        f"is not what {file} (crc32c {crc32c}) was to make there: another run "
                        "writes under this prefix; nothing was replaced, choose another",
                        exit_code=1,
                    )
            elif is_absent and code_of(cause) == 412 and replaces:
                raise UserError(
                    f"{self.uri_of(name)} was deleted during this run: --resume puts it back",
                    exit_code=1,
                )
            if code_of(cause) == 400:
                file.check_undamaged()
            tell(brief(cause) if cause else f"{name} did not arrive")
            stopping.wait(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
        raise Stopped(name)

    def _send(self, file: _Sealed, replaces: int, tell: Callable[[str], None]) -> Receipt:
        from tqdm.utils import CallbackIOWrapper  # late: scripts set tqdm up before it is imported

        blob = self._blob(file.name)
        # The server compares it with what arrives. With checksum="crc32c" the library would send
        # that of whatever the file holds by now.
        blob.crc32c = file.crc32c
        blob.metadata = {"token": self.token}
        with opened(file.source) as stream:
            if stream.seek(0, os.SEEK_END) < file.size:
                file.check_undamaged()
            stream.seek(0)
            blob.upload_from_file(
                CallbackIOWrapper(lambda size: self._count(file, stream.tell()), stream, "read"),
                size=file.size,
                content_type="application/octet-stream",
                if_generation_match=replaces,
                checksum=None,
                timeout=4 * REQUEST_SECONDS,  # a slow line takes long to empty what it buffers
                retry=retry(120, tell),
            )
        return self._receipt(blob)

    def _count(self, file: _Sealed, place: int) -> None:
        self.bytes_read += max(0, place - file.furthest)
        file.furthest = max(place, file.furthest)

    @contextlib.contextmanager
    def _asking(self, what: str, name: str = "", done: int = 0) -> Iterator[None]:
        """Errors of the requests in the block are raised as UserError.

        done: the status of a refusal which says that an earlier request, whose reply was lost,
        arrived.
        """
        self._doing = what
        try:
            yield
        except Exception as error:
            if not is_remote(error):
                raise
            if code_of(error) != done:
                raise self._explained(error, what, name) from error

    def _raise_if_hopeless(self, error: Exception, what: str, name: str) -> None:
        """Raises what trying again does not cure: a refusal in words, a local error as it is."""
        if is_remote(error):
            if is_refusal(error):
                raise self._explained(error, what, name) from error
        elif isinstance(error, OSError):
            raise UserError(
                f"cannot read {error.filename or name}: {error.strerror}", exit_code=1
            ) from error
        else:
            raise error

    def _explained(self, error: Exception, what: str, name: str) -> UserError:
        uri = self.uri_of(name) if name else self.uri
        return explained(error, what, self.bucket_name, uri, bool(name))

    def _blob(self, name: str) -> Any:
        return _client().bucket(self.bucket_name).blob(self._start + name, chunk_size=CHUNK_BYTES)

    def _receipt(self, blob: Any) -> Receipt:
        uri = f"{SCHEME}{self.bucket_name}/{blob.name}"
        return Receipt(uri, int(blob.size), blob.crc32c, int(blob.generation))
