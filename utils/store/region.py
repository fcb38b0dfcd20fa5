"""Whether a bucket is in another region than this machine: traffic between regions costs money.

Says nothing where that is not certain: on machines that are not Google's, and for buckets whose
location the account may not ask for.
"""

import http.client
import os

from utils.store.bucket import BucketFolder
from utils.store.deadline import within

# Of https://cloud.google.com/storage/docs/locations: what a dual-region that Google defines
# consists of, and how the regions of a multi-region are named.
DUAL_REGIONS = {
    "asia1": ("asia-northeast1", "asia-northeast2"),
    "eur4": ("europe-north1", "europe-west4"),
    "eur5": ("europe-west1", "europe-west2"),
    "eur7": ("europe-west2", "europe-west3"),
    "eur8": ("europe-west3", "europe-west6"),
    "nam4": ("us-central1", "us-east1"),
}
MULTI_REGIONS = {"us": "us-", "eu": "europe-", "asia": "asia-"}


def machine_region() -> str | None:
    """Of this machine, as Google's metadata server gives it; None where there is none.

    Follows https://cloud.google.com/compute/docs/metadata/querying-metadata; GCE_METADATA_HOST
    names another server, as for Google's own libraries.
    """
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"

    def ask() -> str | None:
        # No proxy may come between: it would answer for its own machine.
        connection = http.client.HTTPConnection(host, timeout=0.5)
        path, ours = "/computeMetadata/v1/instance/zone", {"Metadata-Flavor": "Google"}
        connection.request("GET", path, headers=ours)
        reply = connection.getresponse()
        text = reply.read(1000).decode("ascii")
        if reply.status != 200 or reply.headers.get("Metadata-Flavor") != "Google":
            return None
        return text.strip().rpartition("/")[2].rpartition("-")[0] or None  # of us-central2-b

    try:
        return within(1.5, ask, TimeoutError)  # a name server may be slow
    except (OSError, http.client.HTTPException, ValueError):
        return None


def elsewhere(location: str, regions: list[str], machine: str) -> bool:
    """Whether a bucket is certainly not in the region `machine`.

    location: as its metadata gives it: a region, or one of the names above. regions: those of a
    dual-region that its owner chose.
    """
    place = location.lower()
    if regions := [region.lower() for region in regions] or list(DUAL_REGIONS.get(place, ())):
        return machine not in regions
    if place in MULTI_REGIONS:
        return not machine.startswith(MULTI_REGIONS[place])
    return "-" in place and machine != place


def far_bucket(bucket: BucketFolder) -> str | None:
    """A warning for a bucket in another region than this machine; None for any other."""
    if (machine := machine_region()) is None or (found := bucket.location()) is None:
        return None
    if not elsewhere(*found, machine):
        return None
    return (
        f"gs://{bucket.bucket_name} is in {found[0]} and this machine in {machine}: Google charges "
        f"for what is sent between regions; use a bucket in {machine}, or a machine near the bucket"
    )
