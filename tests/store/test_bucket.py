"""One file to one object, whatever the server and the way to it do; on a server with faults."""

import errno
import io
import os
import random
import threading
import time
from pathlib import Path

import google_crc32c
import pytest
from gcs_server import GcsServer, PreconditionFailed

from utils.errors import UserError
from utils.store import bucket as cloud
from utils.store.bucket import BucketFolder, Damaged, NameTaken, Stopped, parse_uri
from utils.store.local import checksum

SMALL, LARGE = 200_000, 20 << 20  # one request, three chunks


def crc(content: bytes) -> str:
    return checksum(io.BytesIO(content))


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def put(folder: BucketFolder, path: Path, **changed):
    content = path.read_bytes()
    sealed = {"size": len(content), "crc32c": crc(content), "stopping": threading.Event()}
    return folder.put(path, path.name, **{**sealed, **changed})


@pytest.fixture
def folder(gcs):
    return BucketFolder("gs://bucket/some/prefix/")


@pytest.fixture(params=[SMALL, LARGE], ids=["small", "resumable"])
def file(request, tmp_path):
    path = tmp_path / "activations_batch_000001.pkl"
    path.write_bytes(content_of(request.param))
    return path


def test_the_fast_checksum_is_there():
    assert google_crc32c.implementation == "c"


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("gs://bucket", ("bucket", "")),
        ("gs://bucket/", ("bucket", "")),
        ("gs://my-bucket.example.com/a/b/", ("my-bucket.example.com", "a/b")),
        ("gs://bucket/a b/ü%20#?+&=*[x]", ("bucket", "a b/ü%20#?+&=*[x]")),
        (Path("gs://bucket/a/b"), ("bucket", "a/b")),
    ],
)
def test_uris(uri, expected):
    assert parse_uri(uri) == expected


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("bucket/a", "--flag bucket/a is not gs://BUCKET/PREFIX: write gs://bucket/a"),
        ("/bucket/a", "write gs://bucket/a"),
        ("s3://bucket", "is not gs://BUCKET/PREFIX"),
        ("gs:/bucket", "is not gs://BUCKET/PREFIX"),
        ("gs://", "'' is no name of a bucket"),
        ("gs:///a", "'' is no name of a bucket"),
        ("gs://Bucket/a", "'Bucket' is no name of a bucket"),
        ("gs://b/a", "'b' is no name of a bucket"),
        ("gs://buc ket", "'buc ket' is no name of a bucket"),
        ("gs://bucket//a", "empty, `.` or `..`: write gs://bucket/a"),
        ("gs://bucket/a//b", "empty, `.` or `..`: write gs://bucket/a/b"),
        ("gs://bucket/a//", "empty, `.` or `..`: write gs://bucket/a"),
        ("gs://bucket/../a", "empty, `.` or `..`: write gs://bucket/a"),
        ("gs://bucket/a\nb", "takes no such prefix"),
        ("gs://bucket/" + "a" * 901, "takes no such prefix"),
        ("gs://bucket/.well-known/acme", "takes no such prefix"),
    ],
)
def test_uris_that_are_refused(uri, words):
    with pytest.raises(UserError) as error:
        parse_uri(uri, "--flag")
    assert words in str(error.value)


@pytest.mark.parametrize("prefix", ["", "plain", "a b", "ü/é", "50%", "%2F", "a#b", "what?", "1+1"])
def test_names_come_back_as_they_were(gcs, tmp_path, prefix):
    folder = BucketFolder(f"gs://bucket/{prefix}")
    for name in ("plain.pkl", "ü %#?+ &.pkl"):
        (tmp_path / name).write_bytes(name.encode())
        receipt = put(folder, tmp_path / name)
        assert receipt.uri == folder.uri_of(name)
        assert folder.read(name) == name.encode()
        assert gcs.objects()[f"{prefix}/{name}".removeprefix("/")] == name.encode()
    assert set(folder.names()) == {"plain.pkl", "ü %#?+ &.pkl"}


def test_a_listing_is_of_the_folder_alone(folder, gcs, tmp_path):
    for uri in ("gs://bucket/some/prefix", "gs://bucket/some/prefix/below", "gs://bucket/some"):
        (tmp_path / "x").write_bytes(b"x")
        put(BucketFolder(uri), tmp_path / "x")
    assert folder.names() == ["x"]


def test_no_name_of_a_listing_leads_out_of_the_folder(folder, monkeypatch):
    """Names become files of a cache, and a server can say what it likes."""

    class Blob:
        size, crc32c, generation = 1, "AAAAAA==", 1

        def __init__(self, name):
            self.name = f"some/prefix/{name}"

    class Client:
        def list_blobs(self, *args, **options):
            return map(Blob, ["x", "", "..", ".", "../x", "/../../x", "a/../../x", "/etc/passwd"])

    monkeypatch.setattr(cloud, "_client", Client)
    assert folder.names() == ["x"]


def test_a_temporary_folder_that_is_full_is_named(folder, gcs, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gcs.store("some/prefix/x", b"content")
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    words = r"cannot keep gs://bucket/some/prefix/x in .* No space left .*free space, or set TMPDIR"
    with pytest.raises(UserError, match=words):
        folder.read("x")


# -------------------------------------------------------------------------------------- faults


FAULTS = {
    "a storm of 503 and 429": [(503, 4), (429, 3)],
    "500 and 502": [(500, 1), (502, 1)],
    "connections reset": [("reset", 3)],
    "reset in the middle of a chunk": [("midway", 2)],
    "replies lost": [("lost", 3)],
}
OF_CHUNKS = {
    "a short 308": ("short", lambda r: r.kind == "chunk" and not r.last),
    "a session gone, 410": ("vanish", lambda r: r.kind == "chunk"),
    "a session gone, 404": (404, lambda r: r.kind == "chunk" and r.last),
    "the last reply lost": ("lost", lambda r: r.kind == "chunk" and r.last),
    "a reply lost between": ("lost", lambda r: r.kind == "chunk" and not r.last),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_object_arrives_once(folder, gcs, file, kind):
    faults = [gcs.fault(action, times=times) for action, times in FAULTS[kind]]
    receipt = put(folder, file)
    assert all(fault.times == 0 for fault in faults), "not every fault came to pass"
    assert_arrived_once(gcs, file, receipt)


@pytest.mark.parametrize("kind", OF_CHUNKS)
def test_a_resumable_upload_arrives_once(folder, gcs, tmp_path, kind):
    path = tmp_path / "shard.pkl"
    path.write_bytes(content_of(LARGE))
    action, when = OF_CHUNKS[kind]
    fault = gcs.fault(action, when, times=2 if action != 404 else 1)
    receipt = put(folder, path)
    assert fault.seen
    assert_arrived_once(gcs, path, receipt)


def test_a_stall_ends(folder, gcs, file, monkeypatch):
    monkeypatch.setattr(cloud, "REQUEST_SECONDS", 0.5)
    fault = gcs.fault("stall", lambda r: r.kind in ("multipart", "chunk"), times=2)
    receipt = put(folder, file)
    assert fault.times == 0
    assert_arrived_once(gcs, file, receipt)


def assert_arrived_once(gcs, path, receipt):
    name = f"some/prefix/{path.name}"
    made = gcs.generations(name)
    assert len(made) == 1
    assert gcs.objects()[name] == path.read_bytes()
    assert (receipt.crc32c, receipt.size) == (crc(path.read_bytes()), path.stat().st_size)
    assert receipt.generation == int(made[0]["generation"])


def test_causes_are_told_and_trying_ends_when_told_to(folder, gcs, file):
    gcs.fault(503, times=10**6)
    stopping, causes = threading.Event(), []

    def trouble(cause):
        causes.append(cause)
        if len(causes) == 3:
            stopping.set()
            gcs.faults.clear()
            gcs.fault(404, lambda r: r.kind in ("multipart", "start"), times=9)

    with pytest.raises(Stopped):
        put(folder, file, stopping=stopping, trouble=trouble)
    assert causes[0] == "503 a fault to order"
    assert gcs.objects() == {}


# ----------------------------------------------------------------------------- what is refused


ONE, CHUNK = 2 << 20, cloud.CHUNK_BYTES


@pytest.mark.parametrize("size", [0, 1, ONE, ONE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_every_size(folder, gcs, tmp_path, size):
    """The first so many bytes of a file that grows meanwhile."""
    path = tmp_path / "answers.jsonl"
    content = content_of(size)
    path.write_bytes(content + b"more")
    put(folder, path, size=size, crc32c=crc(content))
    assert gcs.objects("some/prefix/") == {"answers.jsonl": content}


def test_other_content_is_never_replaced(folder, gcs, file):
    put(folder, file)
    before = gcs.objects()
    file.write_bytes(content_of(1000, seed=1))
    with pytest.raises(NameTaken) as error:
        put(folder, file)
    assert str(file) in str(error.value) and folder.uri_of(file.name) in str(error.value)
    assert gcs.objects() == before


def test_equal_content_counts_as_sent(folder, gcs, file):
    first = put(folder, file)
    assert put(BucketFolder(folder.uri), file) == first
    assert len(gcs.generations(f"some/prefix/{file.name}")) == 1


def test_equal_content_of_another_is_refused_where_the_name_is_a_claim(folder, gcs, file):
    put(folder, file, exclusive=True)
    with pytest.raises(NameTaken):
        put(BucketFolder(folder.uri), file, exclusive=True)


def test_a_claim_whose_reply_was_lost_is_ones_own(folder, gcs, file):
    gcs.fault("lost", lambda r: r.kind == "multipart" or r.last)
    put(folder, file, exclusive=True)
    assert len(gcs.generations(f"some/prefix/{file.name}")) == 1


def test_replacing_names_what_is_replaced(folder, gcs, file):
    first = put(folder, file)
    file.write_bytes(b"second")
    second = put(folder, file, replaces=first.generation)
    file.write_bytes(b"third")
    with pytest.raises(NameTaken):
        put(folder, file, replaces=first.generation)
    assert folder.read(file.name) == b"second"
    assert second.generation == folder.listing()[file.name].generation


def test_a_reply_lost_while_replacing(folder, gcs, file):
    first = put(folder, file)
    file.write_bytes(b"second")
    gcs.fault("lost", lambda r: r.kind == "multipart")
    put(folder, file, replaces=first.generation, exclusive=True)
    assert len(gcs.generations(f"some/prefix/{file.name}")) == 2


def test_an_object_that_was_deleted_is_not_replaced(folder, gcs, file):
    first = put(folder, file)
    gcs.storage.objects["bucket"].pop(f"some/prefix/{file.name}")
    with pytest.raises(UserError, match="was deleted during this run: --resume puts it back"):
        put(folder, file, replaces=first.generation)


def test_an_object_that_nobody_could_look_up_was_not_deleted(folder, gcs, file, monkeypatch):
    """The reply is lost, trying again is refused, and then the network is away for a while."""
    first = put(folder, file)
    file.write_bytes(b"second")
    gcs.fault("lost", lambda r: r.kind == "multipart")
    find, failures = folder.find, [ConnectionError("no route to host")]

    def found(name):
        if failures:
            raise failures.pop()
        return find(name)

    monkeypatch.setattr(folder, "find", found)
    put(folder, file, replaces=first.generation, exclusive=True)
    assert len(gcs.generations(f"some/prefix/{file.name}")) == 2 and not failures


def test_a_file_damaged_after_it_was_sealed_becomes_no_object(folder, gcs, file):
    content = bytearray(file.read_bytes())
    sealed = {"size": len(content), "crc32c": crc(content)}
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged) as error:
        put(folder, file, **sealed)
    assert str(file) in str(error.value) and sealed["crc32c"] in str(error.value)
    assert gcs.objects() == {}
    assert any(r.kind == "multipart" or r.last for r in gcs.requests), "the server was to refuse it"


def test_a_file_cut_short_becomes_no_object(folder, gcs, file):
    sealed = {"size": file.stat().st_size, "crc32c": crc(file.read_bytes())}
    os.truncate(file, sealed["size"] // 2)
    with pytest.raises(Damaged):
        put(folder, file, **sealed)
    assert gcs.objects() == {}


def test_a_file_that_is_gone(folder, gcs, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.pkl"):
        folder.put(tmp_path / "gone.pkl", "x", 1, "AAAAAA==", stopping=threading.Event())


def test_a_download_that_breaks_is_taken_up_again(folder, gcs, file):
    put(folder, file)
    gcs.fault(503, lambda r: r.kind == "read", times=2)
    gcs.fault("lost", lambda r: r.kind == "read")
    assert folder.read(file.name) == file.read_bytes()


# ------------------------------------------------------------------------------------ preflight


def test_preflight_leaves_nothing(folder, gcs):
    assert folder.check_access() == {}
    assert gcs.objects() == {}
    assert {r.kind for r in gcs.requests} == {"list", "multipart", "read", "delete"}


def test_preflight_survives_hiccups(folder, gcs):
    gcs.fault(503, times=4)
    gcs.fault("reset")
    gcs.fault("lost", lambda r: r.kind == "multipart")
    gcs.fault("lost", lambda r: r.kind == "delete")
    assert folder.check_access() == {}
    assert gcs.objects() == {}


FORBIDDEN = {
    "list": ("list", "no permission to list gs://bucket/some/prefix: grant"),
    "write": ("multipart", "no permission to write to gs://bucket/some/prefix: grant"),
    "read": ("read", "no permission to read from gs://bucket/some/prefix: grant"),
    "delete": ("delete", "no permission to delete or replace objects in gs://bucket/some/prefix"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_each_permission_is_asked_for(folder, gcs, what):
    kind, words = FORBIDDEN[what]
    gcs.fault(403, lambda r: r.kind == kind, times=9)
    with pytest.raises(UserError) as error:
        folder.check_access()
    assert str(error.value).startswith(words)
    assert "--role=roles/storage.objectUser" in str(error.value)


RETENTION = "Object 'b/x' is subject to bucket's retention policy and cannot be deleted, "
RETENTION += "overwritten or archived until 2027-02-05T11:36:47-08:00"
HOLD = (
    "Object 'b/x' is under active Event-Based hold and cannot be deleted, overwritten or archived"
)
VPC = "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: VQQnKf"
KMS = "Permission denied on Cloud KMS key. Please ensure that your Cloud Storage service account "
KMS += "has been authorized to use this key."
PAYS = "Bucket is a requester pays bucket but no user project provided."
BILLING = "The billing account for the owning project is disabled in state absent"
# What a server says, and what is to be done about it.
REPLIES = {
    "requester pays": (400, PAYS, "required", "--no-requester-pays"),
    "retention": (403, RETENTION, "retentionPolicyNotMet", "a retention policy keeps"),
    "retention, no reason": (403, RETENTION, "forbidden", "--clear-retention-period"),
    "hold": (403, HOLD, "objectUnderActiveHold", "a hold keeps"),
    "billing": (403, BILLING, "accountDisabled", "has no open billing account"),
    "perimeter": (403, VPC, "forbidden", "a perimeter of VPC Service Controls"),
    "key": (403, KMS, "forbidden", "--authorize-cmek=KEY"),
    "scope": (403, "Insufficient Permission", "insufficientPermissions", "--scopes=cloud-platform"),
    "role": (403, "x does not have storage.objects.create access", "forbidden", "objectUser"),
    "no bucket": (404, "The specified bucket does not exist.", "notFound", "buckets create"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_what_the_server_says_decides_the_advice(folder, gcs, tmp_path, kind):
    """In the check before a run, and as soon as it is said to an upload."""
    *reply, words = REPLIES[kind]
    file = tmp_path / "shard.pkl"
    file.write_bytes(b"x")
    gcs.fault(tuple(reply), lambda r: r.kind in ("multipart", "start"), times=9)
    for attempt in (folder.check_access, lambda: put(folder, file)):
        with pytest.raises(UserError) as error:
            attempt()
        assert words in str(error.value) and "gs://bucket" in str(error.value)
        assert words == "buckets create" or reply[1][:60] in str(error.value)
        assert "check the network" not in str(error.value)
    assert gcs.objects() == {}


def test_too_many_requests_pass(folder, gcs, file):
    fault = gcs.fault((403, "The rate of writes is exceeded", "rateLimitExceeded"), times=2)
    assert_arrived_once(gcs, file, put(folder, file))
    assert fault.times == 0


def test_a_bucket_that_does_not_exist(gcs):
    with pytest.raises(UserError, match="gcloud storage buckets create gs://nowhere"):
        BucketFolder("gs://nowhere/prefix").check_access()


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_server_that_is_not_there(gcs, monkeypatch, kind):
    monkeypatch.setattr(cloud, "PREFLIGHT_SECONDS", 5)
    if kind == "refused":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    else:
        gcs.fault("stall", times=99)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"check the network"):
        BucketFolder("gs://bucket/prefix").check_access()
    assert time.monotonic() - begin < 8


def test_no_credentials(monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for asked in (BucketFolder.check_access, lambda folder: folder.read("name")):
        with pytest.raises(UserError, match="gcloud auth application-default login"):
            asked(BucketFolder("gs://bucket/prefix"))


def test_what_passes_and_what_does_not():
    import requests
    from google.api_core.exceptions import from_http_status
    from google.auth.exceptions import RefreshError, TransportError

    from utils.store.errors import is_refusal

    hiccup = RefreshError(TransportError("the metadata server does not answer"))
    assert not is_refusal(hiccup) and is_refusal(RefreshError("invalid_grant"))
    for reason, refused in (("rateLimitExceeded", False), ("forbidden", True)):
        response = requests.Response()
        response.status_code = 403
        response._content = f'{{"error": {{"errors": [{{"reason": "{reason}"}}]}}}}'.encode()
        assert is_refusal(from_http_status(403, "x", response=response)) is refused


def test_the_server_of_these_tests_enforces_preconditions():
    """What the emulator lacks by itself."""
    server = GcsServer()
    try:
        server.storage.expected = 0
        server.storage.create_file("bucket", "a", b"x", {"generation": "1"})
        with pytest.raises(PreconditionFailed):
            server.storage.create_file("bucket", "a", b"y", {"generation": "2"})
    finally:
        server.close()
