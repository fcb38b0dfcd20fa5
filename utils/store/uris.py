"""Addresses of folders and objects in a bucket: `gs://bucket/some/prefix`."""

import re
from pathlib import Path

from utils.errors import UserError

SCHEME = "gs://"


def is_uri(path: str | Path) -> bool:
    """Whether `path` speaks of a bucket; pathlib leaves one slash of the two."""
    return str(path).startswith("gs:/")


def parse_uri(uri: str | Path, flag: str = "") -> tuple[str, str]:
    """`gs://bucket/some/prefix/` -> ("bucket", "some/prefix").

    flag: named in the UserError that is raised for anything else.
    """
    text = str(uri)
    if isinstance(uri, Path) and is_uri(uri):
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
    if prefix and not {"", ".", ".."}.isdisjoint(parts):
        plain = "/".join(part for part in parts if part.strip("."))
        raise UserError(
            f"{where}: a part of the prefix is empty, `.` or `..`: write gs://{bucket}/{plain}"
        )
    if not prefix.isprintable() or len(prefix.encode()) > 900 or parts[0] == ".well-known":
        raise UserError(f"{where}: a bucket takes no such prefix: choose a shorter, plainer one")
    return bucket, prefix
