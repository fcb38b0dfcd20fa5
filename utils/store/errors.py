"""What can go wrong between here and a bucket, and what the person at the shell can do about it.

Which errors pass by themselves is the client library's to say
(https://cloud.google.com/storage/docs/retry-strategy). It is imported when it is first needed.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from utils.errors import UserError

NO_BUCKET = (
    "the bucket gs://{bucket} does not exist: create it with `gcloud storage buckets create "
    "gs://{bucket}`, or correct the name"
)
# A pattern of what `_advice` knows of an error, and the advice; the first row that fits counts. The
# `reason` in a reply is often no more than `forbidden`, so that the message decides, too. What is
# in the first table is not cured by trying again.
REFUSALS = {
    "None .*keyfile .*DefaultCredentialsError": "GOOGLE_APPLICATION_CREDENTIALS is {path}, which "
    "gives no credentials for {uri} ({said}): correct or unset it",
    "None .*DefaultCredentialsError": "no Google Cloud credentials for {uri}: run `gcloud auth "
    "application-default login`, or give the VM a service account that may use storage",
    "401 |None .*GoogleAuthError": "the Google Cloud credentials for {uri} are not accepted "
    "({said}): run `gcloud auth application-default login`",
    "400 .*requester pays": "{uri} is in a bucket whose readers pay (requester pays), which is not "
    "supported: turn that off with `gcloud storage buckets update gs://{bucket} "
    "--no-requester-pays`, or choose another bucket ({said})",
    "403 .*(retentionPolicyNotMet|retention policy|object retention)": "a retention policy keeps "
    "objects in {uri} from being deleted or replaced, which a run has to do with its manifest: "
    "choose a bucket without one, or `gcloud storage buckets update gs://{bucket} "
    "--clear-retention-period` ({said})",
    "403 .*(objectUnderActiveHold|under active .*hold)": "a hold keeps objects in {uri} from being "
    "deleted or replaced, which a run has to do with its manifest: release it, or choose a bucket "
    "that puts no hold on new objects ({said})",
    "403 .*(accountDisabled|billing account)": "the project of gs://{bucket} has no open billing "
    "account: link one to it, or choose another bucket ({said})",
    "403 .*(vpcServiceControls|SECURITY_POLICY_VIOLATED|prohibited by organization's policy)": "a "
    "perimeter of VPC Service Controls shuts {uri} off from here: run inside the perimeter, or ask "
    "its administrator to let this account and network in ({said})",
    "40[03] .*cloud ?kms": "the Cloud KMS key of gs://{bucket} cannot be used: enable it, and let "
    "the bucket's own service account use it with `gcloud storage service-agent "
    "--authorize-cmek=KEY` ({said})",
    "403 .*(insufficient(Permissions| authentication scope)|scope.* not authorized)": "the access "
    "scopes of this VM do not cover {uri}, whatever its account may do: stop the VM and give it "
    "one that does: gcloud compute instances set-service-account VM --scopes=cloud-platform "
    "({said})",
    # Too many requests have this status as well, but pass.
    "403 (?!.*rateLimitExceeded)": "no permission to {what} {uri}: grant the account "
    "roles/storage.objectUser: gcloud storage buckets add-iam-policy-binding gs://{bucket} "
    "--member=ACCOUNT --role=roles/storage.objectUser ({said})",
    "404 .*bucket does not exist": NO_BUCKET,
}
OTHERS = {
    ".*DataCorruption": "{uri} is refused: its bytes do not have the crc32c that the bucket "
    "says: fetch it again, or put it right there",
    "404 object ": "{uri} does not exist: check the path",
    "404 ": NO_BUCKET,
    "": "cannot {what} {uri}: {said}; check the network and try again",
}


def retry(seconds: float, tell: Callable[[str], None] = lambda cause: None) -> Any:
    """The library's own retry of requests, which all requests here allow, for so many seconds.

    tell: called with the cause of each failure; what it raises ends the retries.
    """
    from google.cloud.storage.retry import DEFAULT_RETRY

    strategy = DEFAULT_RETRY.with_timeout(seconds).with_delay(initial=0.25, maximum=8, multiplier=2)
    return lambda request: strategy(request, on_error=lambda error: tell(brief(error)))


def is_remote(error: BaseException) -> bool:
    """Whether the error came over the network: of the server, of the way to it, or of a reply that
    the library could make nothing of (a ValueError: "Bytes stream is in unexpected state")."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(libraries & {"google", "requests", "urllib3"}) or isinstance(
        error, ConnectionError | TimeoutError | ValueError
    )


def is_refusal(error: BaseException) -> bool:
    """Whether trying again is no use: who asks is not known, or not allowed to, or asks in vain.

    A VM's metadata server that does not answer for a moment is a refresh that failed in transport:
    it passes.
    """
    from google.auth.exceptions import TransportError

    links = (error, error.__cause__, *error.args[:1])
    in_transport = any(isinstance(link, TransportError) for link in links)
    return not in_transport and bool(_advice(REFUSALS, error))


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
    words = _reply(cause) or getattr(cause, "message", "") or str(cause)
    if said := re.search(r'"message": "([^"]*)"', words):
        words = said[1]
    words = f"{code_of(cause) or ''} {words or type(cause).__name__}"
    return " ".join(words.split())[:200]


def explained(error: Exception, what: str, bucket: str, uri: str, is_object: bool) -> UserError:
    """The error, as what the person at the shell can do about it.

    what: was tried with `uri`, an object or a folder of `bucket`.
    """
    path = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    about = ("object " if is_object else "") + ("keyfile " if path else "")
    advice = _advice(REFUSALS, error, about) or _advice(OTHERS, error, about)
    return UserError(advice.format(uri=uri, bucket=bucket, what=what, said=brief(error), path=path))


def _advice(table: dict[str, str], error: BaseException, about: str = "") -> str | None:
    """Of the row that fits the error's status, what else is known about it, and its words."""
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    known, flags = f"{code_of(error)} {about}{names} {_reply(error)}", re.IGNORECASE | re.DOTALL
    return next((advice for row, advice in table.items() if re.match(row, known, flags)), None)


def _reply(error: BaseException) -> str:
    """The body of a server's refusal; empty where there is none."""
    response, code = getattr(error, "response", None), code_of(error)
    return response.text if response is not None and code and code >= 400 else ""
