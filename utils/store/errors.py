"""What can go wrong between here and a bucket, and what the person at the shell can do about it.

Which errors pass by themselves is the client library's to say
(https://cloud.google.com/storage/docs/retry-strategy). It is imported when it is first needed.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from utils.errors import UserError

ROLE = "roles/storage.objectUser"

NOT_ACCEPTED = (
    "the Google Cloud credentials for {uri} are not accepted ({said}): run `gcloud auth "
    "application-default login`"
)
NO_BUCKET = (
    "the bucket gs://{bucket} does not exist: create it with `gcloud storage buckets create "
    "gs://{bucket}`, or correct the name"
)
# Status and body of a reply, as a pattern, and the advice; the first row that fits counts. The
# `reason` in the body is often no more than `forbidden`, so that the message decides, too.
ADVICE = (
    (
        "400 .*requester pays",
        "{uri} is in a bucket whose readers pay (requester pays), which is not supported: turn "
        "that off with `gcloud storage buckets update gs://{bucket} --no-requester-pays`, or "
        "choose another bucket ({said})",
    ),
    (
        "403 .*(retentionPolicyNotMet|retention policy|object retention)",
        "a retention policy keeps objects in {uri} from being deleted or replaced, which a run has "
        "to do with its manifest: choose a bucket without one, or `gcloud storage buckets update "
        "gs://{bucket} --clear-retention-period` ({said})",
    ),
    (
        "403 .*(objectUnderActiveHold|under active .*hold)",
        "a hold keeps objects in {uri} from being deleted or replaced, which a run has to do with "
        "its manifest: release it, or choose a bucket that puts no hold on new objects ({said})",
    ),
    (
        "403 .*(accountDisabled|billing account)",
        "the project of gs://{bucket} has no open billing account: link one to it, or choose "
        "another bucket ({said})",
    ),
    (
        "403 .*(vpcServiceControls|SECURITY_POLICY_VIOLATED|prohibited by organization's policy)",
        "a perimeter of VPC Service Controls shuts {uri} off from here: run inside the perimeter, "
        "or ask its administrator to let this account and network in ({said})",
    ),
    (
        "40[03] .*cloud ?kms",
        "the Cloud KMS key of gs://{bucket} cannot be used: enable it, and let the bucket's own "
        "service account use it with `gcloud storage service-agent --authorize-cmek=KEY` ({said})",
    ),
    (
        "403 .*(insufficientPermissions|insufficient authentication scope|scope.* not authorized)",
        "the access scopes of this VM do not cover {uri}, whatever its account may do: stop the VM "
        "and give it one that does: gcloud compute instances set-service-account VM "
        "--scopes=cloud-platform ({said})",
    ),
    (
        "403 (?!.*rateLimitExceeded)",  # too many requests, which passes
        "no permission to {what} {uri}: grant the account {role}: gcloud storage buckets "
        "add-iam-policy-binding gs://{bucket} --member=ACCOUNT --role={role} ({said})",
    ),
    ("401 ", NOT_ACCEPTED),
    ("404 .*bucket does not exist", NO_BUCKET),
)


def retry(seconds: float, tell: Callable[[str], None] | None = None) -> Any:
    """The library's own retry of requests, which all requests here allow, for so many seconds.

    tell: called with the cause of each failure; what it raises ends the retries.
    """
    from google.cloud.storage.retry import DEFAULT_RETRY

    strategy = DEFAULT_RETRY.with_timeout(seconds).with_delay(initial=0.25, maximum=8, multiplier=2)
    if tell is None:
        return strategy
    return lambda request: strategy(request, on_error=lambda error: tell(brief(error)))


def is_remote(error: BaseException) -> bool:
    """Whether the error came over the network: of the server, of the way to it, or of a reply that
    the library could make nothing of (a ValueError: "Bytes stream is in unexpected state")."""
    import requests
    import urllib3
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    kinds = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, ValueError)
    ways = (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)
    return isinstance(error, kinds + ways)


def is_refusal(error: BaseException) -> bool:
    """Whether trying again is no use: who asks is not known, or not allowed to, or asks in vain.

    A VM's metadata server that does not answer for a moment is a refresh that failed in transport:
    it passes.
    """
    from google.auth.exceptions import GoogleAuthError, TransportError

    if isinstance(error, GoogleAuthError):
        in_transport = (error, error.__cause__, *error.args[:1])
        return not any(isinstance(link, TransportError) for link in in_transport)
    return _advice(error) is not None


def code_of(error: BaseException | None) -> int | None:
    """The HTTP status of a server's refusal."""
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None)
    return int(code) if isinstance(code, int) else None


@contextlib.contextmanager
def done_before(status: int) -> Iterator[None]:
    """A refusal that says that an earlier request arrived, whose reply was lost."""
    try:
        yield
    except Exception as error:
        if code_of(error) != status:
            raise


def brief(error: BaseException) -> str:
    """The server's own words, or those of the library, in one short line."""
    import requests

    cause = getattr(error, "cause", None) or error  # of a RetryError, what was retried
    if isinstance(cause, requests.Timeout):
        return "no answer in time"
    if isinstance(cause, requests.ConnectionError):
        return "no connection"
    words, code = _reply(cause) or getattr(cause, "message", "") or str(cause), code_of(cause)
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

    path = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if isinstance(error, DefaultCredentialsError) and path:
        advice = (
            "GOOGLE_APPLICATION_CREDENTIALS is {path}, which gives no credentials for {uri} "
            "({said}): correct or unset it"
        )
    elif isinstance(error, DefaultCredentialsError):
        advice = (
            "no Google Cloud credentials for {uri}: run `gcloud auth application-default login`, "
            "or give the VM a service account that may use storage"
        )
    elif isinstance(error, GoogleAuthError):
        advice = NOT_ACCEPTED
    elif isinstance(error, DataCorruption):
        advice = (
            "{uri} is refused: its bytes do not have the crc32c that the bucket says: fetch it "
            "again, or put it right there"
        )
    elif found := _advice(error):
        advice = found
    elif code_of(error) == 404:
        advice = "{uri} does not exist: check the path" if is_object else NO_BUCKET
    else:
        advice = "cannot {what} {uri}: {said}; check the network and try again"
    said = brief(error)
    return UserError(
        advice.format(uri=uri, bucket=bucket, what=what, said=said, role=ROLE, path=path)
    )


def _advice(error: BaseException) -> str | None:
    """Of the row of ADVICE that fits."""
    reply = f"{code_of(error)} {_reply(error)}"
    flags = re.IGNORECASE | re.DOTALL
    return next((advice for pattern, advice in ADVICE if re.match(pattern, reply, flags)), None)


def _reply(error: BaseException) -> str:
    """The body of a server's refusal; empty where there is none."""
    response, code = getattr(error, "response", None), code_of(error)
    return response.text if response is not None and code and code >= 400 else ""
