"""The warning of a bucket in another region than the machine, with a fake metadata server."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import words

import simple_extraction_inference as script
from utils.store.bucket import BucketFolder
from utils.store.region import elsewhere, far_bucket, machine_region

CUSTOM = ["US-EAST1", "US-WEST1"]


@contextmanager
def metadata_server(monkeypatch, zone, flavor="Google"):
    """Google's, as a machine in that zone sees it; gives the requests that came."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            body = f"projects/123456/zones/{zone}".encode()
            self.send_response(200)
            self.send_header("Metadata-Flavor", flavor)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


@pytest.mark.parametrize(
    ("location", "regions", "machine", "far"),
    [
        ("US-CENTRAL1", [], "us-central1", False),
        ("US-CENTRAL1", [], "us-central2", True),
        ("US", [], "us-central2", False),
        ("US", [], "europe-west4", True),
        ("EU", [], "europe-west4", False),
        ("EU", [], "us-east5", True),
        ("ASIA", [], "asia-northeast1", False),
        ("ASIA", [], "australia-southeast1", True),
        ("NAM4", [], "us-east1", False),
        ("NAM4", [], "us-east5", True),
        ("EUR4", [], "europe-west4", False),
        ("US", CUSTOM, "us-west1", False),
        ("US", CUSTOM, "us-central1", True),
        ("NAM9", [], "us-central1", False),  # which is not known here
    ],
)
def test_a_bucket_that_is_certainly_elsewhere(location, regions, machine, far):
    assert elsewhere(location, regions, machine) is far


def located(gcs, location, **more):
    gcs.storage.buckets["bucket"].update({"location": location, **more})
    return BucketFolder("gs://bucket/run")


def test_the_machine_and_the_bucket_are_asked(gcs, monkeypatch):
    far = located(gcs, "EUROPE-WEST4")
    with metadata_server(monkeypatch, "us-central2-b") as asked:
        assert machine_region() == "us-central2"
        warning = far_bucket(far)
        assert "gs://bucket is in EUROPE-WEST4 and this machine in us-central2" in warning
        assert far_bucket(located(gcs, "US-CENTRAL2")) is None
        dual = {"customPlacementConfig": {"dataLocations": CUSTOM}}
        assert "is in US and" in far_bucket(located(gcs, "US", **dual))
    assert set(asked) == {("/computeMetadata/v1/instance/zone", "Google")}


def test_without_the_permission_nothing_is_said(gcs, monkeypatch):
    far = located(gcs, "EUROPE-WEST4")
    with metadata_server(monkeypatch, "us-central2-b"):
        refusal = (403, "no storage.buckets.get access", "forbidden")
        fault = gcs.fault(refusal, lambda request: request.kind == "list")
        assert far_bucket(far) is None
        assert len(fault.seen) == 1


def test_elsewhere_than_at_google_nobody_is_asked(gcs, monkeypatch):
    far = located(gcs, "EUROPE-WEST4")
    assert machine_region() is None and far_bucket(far) is None  # nothing listens there
    with metadata_server(monkeypatch, "us-central2-b", flavor=""):  # some other server
        assert machine_region() is None and far_bucket(far) is None
    assert gcs.requests == []


def test_a_run_that_uploads_is_warned(
    gcs, tiny_model, tasks_file, tmp_path, monkeypatch, in_shell, caplog
):
    located(gcs, "EUROPE-WEST4")
    flags = {
        "model_path": tiny_model,
        "dataset_path": tasks_file,
        "output_path": tmp_path / "predictions.json",
        "activations_dir": tmp_path / "activations",
        "max_output_tokens": 0,
        "dry_run": True,
    }
    bucket = {"upload_to_cloud": True, "cloud_bucket": "gs://bucket/run"}
    with metadata_server(monkeypatch, "us-central2-b") as asked:
        assert in_shell(script, words(flags))[0] == 0
        assert "regions" not in caplog.text and asked == []
        assert in_shell(script, words({**flags, **bucket}))[0] == 0
        assert caplog.text.count("charges for what is sent between regions") == 1
