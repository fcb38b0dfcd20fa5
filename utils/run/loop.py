"""The run loop that the inference scripts share: tasks in; predictions, shards and manifest out.

One process or several, it is the same loop: each computes its part of every batch and stores the
rows that its own devices hold.
"""

import contextlib
import importlib.metadata
import logging
import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from utils.arc.tasks import SampleKey
from utils.cli import Signals
from utils.errors import UserError
from utils.plan.batching import Batch
from utils.plan.plan import Prepared, settings, train_pairs
from utils.run.compute import Computation, Row, Usage, to_item
from utils.run.dry_run import DiskOutlook, check_disk
from utils.run.ending import Ending
from utils.run.finish import finish, last_files, send_the_rest
from utils.run.peers import LeftBehind, Peers, Sharing, weights_hash
from utils.run.pipeline import Pipeline
from utils.run.resume import look_for_run, uploaded_before
from utils.shards.items import sample_name
from utils.shards.uploads import BucketUploads, Uploads
from utils.shards.writer import ShardWriter
from utils.store.local import locked

log = logging.getLogger(__name__)

STOP_SECONDS = 12  # for the sample that is being stored when a run is stopped


def open_writer(prepared: Prepared, peers: Peers) -> ShardWriter:
    """The run's folder, checked against what is there already; nothing is changed yet."""
    request, mesh = prepared.request, prepared.layout.mesh
    output = Path(request.output_path)
    if output.exists() and not (request.resume or request.overwrite):
        raise UserError(
            f"{output} exists: continue its run with --resume, replace it with --overwrite, or "
            "choose another path"
        )
    facts = {
        "arguments": request.arguments,
        "versions": _versions(),
        "devices": [str(device) for device in mesh.devices.flat],
        "mesh_shape": [prepared.layout.data, prepared.layout.model],
        "processes": peers.count,
        "train_pairs": train_pairs(prepared),
        "special_ids": sorted(prepared.tokenizer.all_special_ids),
    }
    deciding = settings(prepared, weights_hash(prepared.checkpoint, peers))
    elsewhere = None
    if prepared.bucket is not None:
        elsewhere = look_for_run(
            prepared.bucket,
            prepared.listing,
            prepared.run_folder,
            output.name,
            deciding,
            request.resume,
            peers,
        )
    writer = ShardWriter(
        prepared.run_folder,
        deciding,
        facts,
        elsewhere=elsewhere,
        activation_dtype=request.activation_dtype,
        save_every_n_samples=request.save_every_n_samples,
        max_shard_mb=request.max_shard_mb,
        resume=request.resume,
        overwrite=request.overwrite,
        host=peers.index if peers.count > 1 else None,
        num_hosts=peers.count,
    )
    if output.exists() and request.resume and not writer.continues and peers.index == 0:
        raise UserError(
            f"{output} exists, but there is no run to resume in {prepared.run_folder}: choose "
            f"another {request.output_flag}, or replace it with --overwrite"
        )
    return writer


def open_uploads(prepared: Prepared, writer: ShardWriter, peers: Peers) -> Uploads:
    """Of this process; checked against what the bucket holds already, nothing is sent yet."""
    request, bucket = prepared.request, prepared.bucket
    extracts = request.activations_dir is not None
    if bucket is None or (not extracts and peers.index):
        return Uploads()
    first_of_several = extracts and peers.count > 1 and peers.index == 0
    if extracts:
        uploaded_before(bucket, prepared.listing, writer.folder, writer.here)
    return BucketUploads(
        bucket,
        writer,
        prepared.listing,
        max_pending_bytes=request.max_pending_gb * 1e9,
        timeout=request.upload_timeout,
        delete_after_upload=request.delete_after_upload,
        claim=writer.manifest_path.name if extracts else "metadata.json",
        joint_files=writer.elsewhere.listed if first_of_several else None,
        shards=extracts,
    )


def run(prepared: Prepared, signals: Signals, peers: Peers | None = None) -> dict[str, Any]:
    """Computes and stores what is not there yet, then writes `output_path`.

    Returns the finished manifest; of several processes, all call this, and the first gets that of
    all. Raises UserError (exit code 1 from the first write on) and Interrupted; in both cases what
    was committed stays, and `--resume` does the rest.
    """
    ending = Ending(signals, peers)
    peers = ending.peers
    request = prepared.request
    output, folder = Path(request.output_path), prepared.run_folder
    with peers.together("checking"):
        writer = open_writer(prepared, peers)
        uploads = open_uploads(prepared, writer, peers)
    complete = writer.complete and (folder / "metadata.json").exists() and output.exists()
    own, joint = last_files(prepared, writer, peers)
    said = peers.exchange("complete", [complete, uploads.holds(writer.here, *own, *joint)])
    if said[0][0] and all(sent for _, sent in said):
        log.info("the run in %s is complete; there is nothing to do", folder)
        return {}
    shared = peers.sharing(folder)
    done = _done_by_all(writer, shared, peers)
    with peers.together("checking the disk"):
        check_disk(prepared, done, shared.members / peers.count)
    todo = _without_done(prepared, done)
    started = False
    try:
        with peers.together("loading the model"):
            computation = _load(prepared, todo, ending) if todo else None
        ending.hold()
        with locked(folder) if shared.leader else contextlib.nullcontext():
            # In a shared folder the leader clears away what is not part of the run, then the others
            # begin.
            for turn in (True, False):
                with peers.together("starting"):
                    if shared.leader is turn:
                        writer.set_skipped(prepared.skipped)
                        writer.start(leads=turn)
                        started = True
                        if request.overwrite and peers.index == 0:
                            output.unlink(missing_ok=True)
            for turn in (True, False):  # the first process takes the prefix for all
                with peers.together("taking the bucket"):
                    if (peers.index == 0) is turn:
                        uploads.start()
            usage = _run_batches(prepared, todo, done, computation, writer, uploads, ending)
            with peers.together("finishing"):
                manifest = finish(prepared, writer, usage, peers, shared.leader)
            return send_the_rest(prepared, writer, uploads, manifest, ending)
    except BaseException as error:
        if started and not isinstance(error, LeftBehind):
            with contextlib.suppress(UserError):
                writer.close_shard()  # a disk that failed says so again
            uploads.stop()
            log.info("%d samples are stored; --resume does the rest", len(writer.done))
        if isinstance(error, UserError) and started:
            error.exit_code = 1
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                "the device ran out of memory: --resume with a lower --max_batch_tokens or "
                "--batch_size, or start again (--overwrite) with a lower --max_model_len or "
                "--max_output_tokens",
                exit_code=1,
            ) from error
        raise
    finally:
        uploads.close()


def _done_by_all(writer: ShardWriter, shared: Sharing, peers: Peers) -> set[SampleKey]:
    """The samples that are stored in any process's folder.

    Raises UserError where folders hold the same sample, or one holds what another process is about
    to write: brought together, one would hide the other.
    """
    said = peers.exchange(
        "samples", [shared.first, str(writer.folder), sorted(writer.done), writer.hosts]
    )
    owners: dict[SampleKey, int] = {}
    for index, (first, folder, keys, hosts) in enumerate(said):
        if first != index:
            continue
        twice = [key for key in map(tuple, keys) if owners.setdefault(key, index) != index]
        if twice:
            other = owners[twice[0]]
            raise UserError(
                f"{folder} of process {index} and {said[other][1]} of process {other} both hold "
                f"{len(twice)} samples, {sample_name(twice[0])} for one: move one of the folders "
                "away"
            )
        for host in hosts:
            if host < peers.count and said[host][0] != index:
                raise UserError(
                    f"{folder} of process {index} holds shards of process {host}, which writes to "
                    f"{said[host][1]}: give each process the folder that it had"
                )
    return set(owners)


def _load(prepared: Prepared, todo: Sequence[Batch], ending: Ending) -> Computation:
    """The model, and every program that is needed. In a thread, so that a signal is answered."""

    def load() -> Computation:
        computation = Computation(prepared)
        computation.compile(todo)
        return computation

    pool = ThreadPoolExecutor(1, "load")
    try:
        return ending.wait(pool.submit(load))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_done(prepared: Prepared, done: set[SampleKey]) -> list[Batch]:
    """The batches with a row still to do; the shapes stay, rows that are done become padding."""
    todo = []
    for batch in prepared.batches:
        rows = tuple(
            i if i >= 0 and prepared.samples[i].key not in done else -1 for i in batch.rows
        )
        if max(rows) >= 0:
            todo.append(Batch(batch.shape, rows))
    return todo


def _run_batches(
    prepared: Prepared,
    todo: Sequence[Batch],
    done: set[SampleKey],
    computation: Computation | None,
    writer: ShardWriter,
    uploads: Uploads,
    ending: Ending,
) -> Usage:
    """Stores this process's share of every batch in `todo`."""
    if computation is None:
        return Usage()
    request, peers = prepared.request, ending.peers
    begin = time.perf_counter()
    tokens, stored_batches, told = 0, 0, False
    had, outlook = len(writer.done), DiskOutlook(writer.folder)
    # Of several processes the first one's bar counts its own share.
    share = sum(len(batch.rows) - batch.rows.count(-1) for batch in todo) / peers.count
    bar = tqdm(
        total=len(done) + round(share),
        initial=len(done),
        unit="sample",
        desc="inference",
        disable=peers.index > 0,
    )

    def store(rows: list[Row]) -> None:
        nonlocal tokens, stored_batches, told
        tokens += sum(row.num_tokens for row in rows)
        seconds = time.perf_counter() - begin
        writer.update_timing(seconds, computation.compile_seconds, tokens)
        for row in rows:
            ending.check()  # also: whether the others have given this process up
            writer.add(*to_item(row, prepared))
            uploads.make_room()
        stored_batches += 1
        if request.save_every_n_batches and stored_batches % request.save_every_n_batches == 0:
            writer.close_shard()
        bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s", refresh=False)
        bar.update(len(rows))
        if not told and seconds > 10 and pipeline.disk_wait > 0.1 * seconds:
            told = True
            log.warning("the disk is the bottleneck: %s", _disk_words(pipeline.disk_wait, seconds))
        outlook.look(len(writer.done) - had, share)

    pipeline = Pipeline(todo, computation.launch, computation.fetch, store, lambda row: row.nbytes)
    pipeline.start()
    try:
        with bar:
            while not pipeline.wait(0.2):
                ending.check()
                uploads.check()
    except BaseException as error:
        uploads.release()
        cause = ending.leaving(error)
        if not pipeline.stop(STOP_SECONDS):
            writer.abandon()
            log.warning(
                "%s took more than %d s to write: the open shard is given up",
                writer.folder,
                STOP_SECONDS,
            )
        raise cause from error
    seconds = time.perf_counter() - begin
    if pipeline.disk_wait > 0.1 * seconds:
        log.warning("the disk was the bottleneck: %s", _disk_words(pipeline.disk_wait, seconds))
    return computation.usage


def _disk_words(waited: float, seconds: float) -> str:
    return f"the device waited {waited:.0f} of {seconds:.0f} s for what was computed to be stored"


def _versions() -> dict[str, str | None]:
    """Of python, the libraries, and the project's git commit where it is a checkout."""
    packages = ("jax", "flax", "transformers", "numpy")
    found: dict[str, str | None] = {"python": platform.python_version()}
    found.update({name: importlib.metadata.version(name) for name in packages})
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {**found, "commit": commit}
