"""The run that the inference scripts share: tasks in; predictions, shards and manifest out.

One process or several, it is the same loop: each computes its part of every batch and stores the
samples whose states its own devices hold.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from utils.arc.tasks import SampleKey
from utils.cli import Signals
from utils.errors import UserError
from utils.plan.batching import Batch
from utils.plan.plan import Plan
from utils.run.compute import Computation, Usage
from utils.run.conclude import conclude, last_files, send_the_rest, tidy
from utils.run.dry_run import DiskOutlook, check_disk, weight
from utils.run.opening import opened
from utils.run.peers import LeftBehind, Peers
from utils.run.pipeline import pipelined
from utils.run.result import to_item
from utils.shards.manifest import Manifest
from utils.shards.uploads import Uploads
from utils.shards.writer import RunFolder
from utils.store.deadline import within

log = logging.getLogger(__name__)

STOP_SECONDS = 14  # for uploads after a signal; a process is to be gone after 20


def run(plan: Plan, signals: Signals, peers: Peers | None = None) -> Manifest | None:
    """Computes and stores what is not there yet, then writes the output.

    Returns the finished manifest, of several processes the first that of all; None for a run that
    was complete. Of several processes all call this. Raises UserError (exit code 1 from the first
    write on) and Interrupted; in both cases what was committed stays, and `--resume` does the rest.
    """
    peers = peers or Peers(signals=signals)
    with _memory_in_words(), opened(plan, peers) as (folder, uploads, done):
        whole, sent = _complete(plan, folder, uploads, done, peers)
        if whole and sent:
            log.info("the run in %s is complete; there is nothing to do", folder.path)
            return None
        with peers.together("checking the disk"):
            check_disk(plan, done, folder.share)
        # Of such a run the output and the manifest are left: there is nothing to compute it from.
        only_send = whole and plan.request.activations_dir is None
        todo = [] if only_send else plan.without(done)
        with peers.together("loading the model"):
            computation = _loaded(plan, todo, peers) if todo else None
        signals.hold()  # from here on one waits for the next `check`
        with _begun(plan, folder, uploads, peers, only_send):
            if computation is not None:
                _compute(plan, todo, len(done), computation, folder, uploads, peers)
            with peers.together("finishing"):
                usage = computation.usage if computation is not None else Usage()
                if only_send:
                    manifest = folder.held.manifests.get("metadata.json", {})
                else:
                    manifest = conclude(plan, folder, usage, peers)
                tidy(plan, folder, manifest, peers)
            return send_the_rest(plan, folder, uploads, manifest, peers)


@contextlib.contextmanager
def _memory_in_words() -> Iterator[None]:
    """Says what to do where a device has not enough memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device ran out of memory: --resume with a lower --max_batch_tokens or "
            "--batch_size, or start again (--overwrite) with a lower --max_model_len or "
            "--max_output_tokens",
            exit_code=1,
        ) from error


def _complete(
    plan: Plan, folder: RunFolder, uploads: Uploads, done: set[SampleKey], peers: Peers
) -> tuple[bool, bool]:
    """Whether every sample is stored and the run has its output, and whether the bucket, where
    there is one, holds all of it."""
    files = [Path(plan.request.output_path), folder.path / "metadata.json"]
    whole = folder.held.is_complete and all(path.exists() for path in files)
    if plan.request.activations_dir is not None:
        whole = whole and not plan.without(done)
    own, joint = last_files(plan, folder)
    said = peers.exchange("complete", [whole, uploads.holds(*own, *joint)])
    return said[0][0], all(sent for _, sent in said)


def _loaded(plan: Plan, todo: Sequence[Batch], peers: Peers) -> Computation:
    """The model and every program that is needed, in a thread, so that a signal is answered."""

    def load() -> Computation:
        computation = Computation(plan)
        computation.compile(todo)
        return computation

    return within(math.inf, load, TimeoutError, peers.check)


@contextlib.contextmanager
def _begun(
    plan: Plan, folder: RunFolder, uploads: Uploads, peers: Peers, only_send: bool
) -> Iterator[None]:
    """The run writes to its folder, unless it is only to be sent, and to its prefix of the bucket;
    whatever ends it, what it has computed is stored, and sent if that takes seconds."""
    begun = False
    try:
        with peers.together("clearing"):
            if not only_send:
                folder.clear()
        with peers.together("starting"):
            if not only_send:
                folder.begin(list(plan.skipped))
            begun = True
            if plan.request.overwrite and peers.index == 0:
                Path(plan.request.output_path).unlink(missing_ok=True)
        for first in (True, False):  # the first process takes the prefix for all
            with peers.together("taking the bucket"):
                if (peers.index == 0) is first:
                    uploads.start()
        yield
    except BaseException as error:
        cause = peers.ending(error)
        if begun and not isinstance(cause, LeftBehind):
            with contextlib.suppress(UserError):  # a disk that failed says so again
                folder.seal()
            uploads.stop(STOP_SECONDS)
            if not only_send:
                log.info("%d samples are stored; --resume does the rest", folder.num_stored)
        if begun and isinstance(cause, UserError):
            cause.exit_code = 1
        if cause is error:
            raise
        raise cause from error
    uploads.stop(0)


def _compute(
    plan: Plan,
    todo: Sequence[Batch],
    num_done: int,
    computation: Computation,
    folder: RunFolder,
    uploads: Uploads,
    peers: Peers,
) -> None:
    """Stores this process's share of every batch in `todo`."""

    def check() -> None:
        peers.check()
        uploads.check()

    every = plan.request.save_every_n_batches
    samples = [plan.samples[i] for batch in todo for i in batch.rows if i >= 0]
    share = round(len(samples) / peers.count)
    to_store = sum(weight(plan, sample) for sample in samples) / peers.count
    passes = computation.passes(todo)
    pipeline = pipelined(passes, computation.launch, computation.fetch, check)
    outlook, stored, tokens, batches = DiskOutlook(folder.path), 0, 0, 0
    begin = time.perf_counter() - computation.compile_seconds
    with tqdm(
        total=num_done + share,  # of several processes the first one's bar counts its own
        initial=num_done,
        unit="sample",
        desc="inference",
        disable=peers.index > 0,
    ) as bar:
        for job, results in zip(passes, pipeline, strict=True):
            tokens += sum(result.num_tokens for result in results)
            compiling = computation.compile_seconds
            seconds = time.perf_counter() - begin - compiling
            folder.update_timing(seconds, compiling, tokens)
            for result in results:
                check()
                folder.add(*to_item(result, plan))
                uploads.wait_for_room(check)
            batches += job.last
            if every and job.last and batches % every == 0:
                folder.seal()
            # Not drawn by each pass, but as often as the bar is: a line every half minute in a log.
            bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s", refresh=False)
            bar.update(len(results))
            stored += sum(weight(plan, result.sample) for result in results)
            outlook.look(stored, to_store)
    seconds = time.perf_counter() - begin - computation.compile_seconds
    waited = pipeline.waited - uploads.waited  # for room, during which nothing was stored either
    if waited > 0.1 * seconds:
        log.warning(
            "the disk was the bottleneck: the device waited %.0f of %.0f s for what was computed "
            "to be stored", waited, seconds,
        )  # fmt: skip
