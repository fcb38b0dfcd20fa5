"""A run before it begins: its folder, its output and its prefix of a bucket, for this run alone."""

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from utils.arc.tasks import SampleKey
from utils.errors import UserError
from utils.plan.plan import Plan
from utils.run.peers import Peers, weights_hash
from utils.run.resume import manifests_in, restored_from, settle, uploaded_before
from utils.shards.held import Mode, Writer
from utils.shards.manifest import shards_of
from utils.shards.uploads import BucketUploads, Uploads
from utils.shards.writer import RunFolder
from utils.store.locks import claimed

PROJECT = Path(__file__).parents[2]
LIBRARIES = ("jax", "flax", "transformers", "numpy")


@contextlib.contextmanager
def opened(plan: Plan, peers: Peers) -> Iterator[tuple[RunFolder, Uploads, set[SampleKey]]]:
    """The folder of the run, what is sent from it, and the samples that are stored already.

    Nothing is changed, and the run owns its folder and its output until the block ends. Raises
    UserError for what another run has written or is writing, unless it is this one to be resumed.
    Of several processes all call it.
    """
    request = plan.request
    output = Path(request.output_path)
    mode: Mode = "resume" if request.resume else "overwrite" if request.overwrite else "new"
    settings = plan.settings(weights_hash(plan.checkpoint, peers))
    writer = Writer(peers.index, peers.count, request.shard_id, request.num_shards)
    with contextlib.ExitStack() as stack:
        with peers.together("checking"):
            if output.exists() and mode == "new":
                raise UserError(
                    f"{output} exists: continue its run with --resume, replace it with "
                    "--overwrite, or choose another path"
                )
            if peers.index == 0:
                stack.enter_context(claimed(output))
            remote = manifests_in(plan, settings)
            restored = {}
            if plan.bucket is not None and request.resume:
                restored = restored_from(plan, remote, writer, peers)
            folder = stack.enter_context(
                RunFolder(
                    plan.run_folder,
                    settings,
                    _facts(plan, peers),
                    mode=mode,
                    writer=writer,
                    activation_dtype=request.activation_dtype,
                    save_every_n_samples=request.save_every_n_samples,
                    max_shard_mb=request.max_shard_mb,
                    restored=restored,
                    taken=plan.listing,
                )
            )
            if output.exists() and request.resume and not folder.held.manifests and not peers.index:
                raise UserError(
                    f"{output} exists, but there is no run to resume in {plan.run_folder}: choose "
                    f"another {request.output_flag}, or replace it with --overwrite"
                )
        done = settle(plan, folder, peers)
        with peers.together("checking the bucket"):
            listed = shards_of(remote.values()).values()
            uploads = _uploads(plan, folder, [s for s in listed if done.issuperset(s.samples)])
        yield folder, uploads, done


def stored_already(plan: Plan, peers: Peers) -> tuple[set[SampleKey], float]:
    """The samples of a run that are stored, by whatever process, and the share of the others that
    goes to this process's disk; for a dry run, of which all processes call this."""
    with opened(plan, peers) as (folder, _, done):
        return done, folder.share


def _uploads(plan: Plan, folder: RunFolder, listed: list) -> Uploads:
    """Of this process; checked against what the bucket holds already, nothing is sent yet.

    listed: the shards that the bucket's manifests list, less those that are lost.
    """
    request = plan.request
    extracts = request.activations_dir is not None
    if plan.bucket is None or (not extracts and folder.writer.index):
        return Uploads()
    return BucketUploads(
        plan.bucket,
        folder,
        uploaded_before(plan, folder) if extracts else {},
        plan.listing,
        max_pending_bytes=request.max_pending_gb * 1e9,
        timeout=request.upload_timeout,
        delete_after_upload=request.delete_after_upload,
        listed=listed,
        shards=extracts,
    )


def _facts(plan: Plan, peers: Peers) -> dict:
    """Manifest entries that a resumed run may change."""
    return {
        "arguments": plan.request.arguments,
        "versions": _versions(),
        "devices": [str(device) for device in plan.layout.mesh.devices.flat],
        "mesh_shape": [plan.layout.data, plan.layout.model],
        "processes": peers.count,
        "train_pairs": plan.train_pairs,
        "special_ids": sorted(plan.codec.tokenizer.all_special_ids),
    }


def _versions() -> dict[str, str | None]:
    """Of python, the libraries, and the project's git commit where it is a checkout of its own."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    commit = None
    if (PROJECT / ".git").exists():  # else git would name a repository that contains this folder
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            ask = ["git", "--git-dir", PROJECT / ".git", "rev-parse", "HEAD"]
            commit = subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL)
    return {"python": platform.python_version(), **libraries, "commit": commit and commit.strip()}
