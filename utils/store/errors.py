"""What can go wrong between here and a bucket: which errors pass by themselves, and what the person
at the shell can do about the others.

Follows https://cloud.google.com/storage/docs/retry-strategy. The client library is imported when
there is an error to look at.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from utils.errors import UserError

ROLE = "roles/storage.objectUser"


def retry(seconds: float, trouble: Callable[[str], None] | None = None) -> Any:
    """For a request that may be made again, as all here may. seconds: for how long. trouble: told
    the cause each time."""
    from google.api_core.retry import Retry

    return Retry(
        _passes,
        initial=0.25,
        maximum=8,
        multiplier=2,
        timeout=seconds,
        on_error=trouble and (lambda error: trouble(brief(error))),
    )


def is_refusal(error: BaseException) -> bool:
    """Whether trying again is no use: who asks is not known, or not allowed to.

    A VM's metadata server that does not answer for a moment is a refresh that failed in transport,
    and 403 is also said of too many requests: both pass.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError, TransportError

    if isinstance(error, GoogleAuthError):
        in_transport = (error, error.__cause__, *error.args[:1])
        return not any(isinstance(link, TransportError) for link in in_transport)
    if isinstance(error, exceptions.Forbidden):
        return "ateLimitExceeded" not in getattr(error.response, "text", "")
    return isinstance(error, exceptions.Unauthorized)


def is_remote(error: BaseException) -> bool:
    """Whether the error came over the network: of the server, of the way to it, or of a reply that
    the library could make nothing of (a ValueError: "Bytes stream is in unexpected state")."""
    import http.client

    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    kinds = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption)
    ways = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException)
    return isinstance(error, (*kinds, *ways, ConnectionError, TimeoutError, ValueError))


def _passes(error: BaseException) -> bool:
    """Whether the same request may well succeed: 408, 429, 5xx, a connection or a reply lost."""
    if (code := code_of(error)) is not None:
        limited = code == 403 and "ateLimitExceeded" in error.response.text
        return code in (408, 429) or code >= 500 or limited
    return is_remote(error) and not is_refusal(error) and not isinstance(error, ValueError)


def timed_out(error: BaseException | None) -> bool:
    import requests

    chain = (error, getattr(error, "cause", None), getattr(error, "__cause__", None))
    return any(isinstance(link, requests.Timeout | TimeoutError) for link in chain)


def code_of(error: BaseException | None) -> int | None:
    """The HTTP status of a server's refusal."""
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None)
    return int(code) if isinstance(code, int) else None


def brief(error: BaseException) -> str:
    """The server's own words, or those of the library, in one short line."""
    import requests

    cause = getattr(error, "cause", None) or error  # of a RetryError, what was retried
    if isinstance(cause, requests.Timeout):
        return "no answer in time"
    if isinstance(cause, requests.ConnectionError):
        return "no connection"
    response, code = getattr(cause, "response", None), code_of(cause)
    words = response.text if code and code >= 400 and response is not None else ""
    words = words or getattr(cause, "message", "") or str(cause)
    if said := re.search(r'"message": "([^"]*)"', words):
        words = said[1]
    words = " ".join((words or type(cause).__name__).split())
    return f"{code} {words}"[:200] if code else words[:200]


def explained(error: Exception, what: str, bucket: str, uri: str, is_object: bool) -> UserError:
    """The error, as what the person at the shell can do about it.

    what: was tried with `uri`, an object or a folder of `bucket`.
    """
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    code = code_of(error)
    if isinstance(error, DefaultCredentialsError) and (
        path := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    ):
        return UserError(
            f"GOOGLE_APPLICATION_CREDENTIALS is {path}, which gives no credentials for {uri} "
            f"({brief(error)}): correct or unset it"
        )
    if isinstance(error, DefaultCredentialsError):
        return UserError(
            f"no Google Cloud credentials for {uri}: run `gcloud auth application-default "
            "login`, or give the VM a service account that may use storage"
        )
    if isinstance(error, GoogleAuthError) or code == 401:
        return UserError(
            f"the Google Cloud credentials for {uri} are not accepted ({brief(error)}): "
            "run `gcloud auth application-default login`"
        )
    if code == 403:
        return UserError(
            f"no permission to {what} {uri}: grant the account {ROLE}: gcloud storage buckets "
            f"add-iam-policy-binding gs://{bucket} --member=ACCOUNT --role={ROLE} "
            f"({brief(error)})"
        )
    if isinstance(error, DataCorruption):
        return UserError(f"{uri} is refused: its bytes do not have the crc32c that the bucket "
                         "says: fetch it again, or put it right there")  # fmt: skip
    if code == 404 and is_object:
        return UserError(f"{uri} does not exist: check the path")
    if code == 404:
        return UserError(
            f"the bucket gs://{bucket} does not exist: create it with `gcloud storage"
            f" buckets create gs://{bucket}`, or correct the name"
        )
    return UserError(f"cannot {what} {uri}: {brief(error)}; check the network and try again")
