"""The run loop that the inference scripts share: tasks in; predictions, shards and manifest out.

Batches are computed in a thread of their own, so that storing one overlaps with computing the next
and a signal is answered while the device is busy.
"""

import collections
import contextlib
import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from utils import scoring
from utils.arc import MAX_SIDE
from utils.batching import Batch
from utils.cli import Signals
from utils.compute import Computation, Row, Timing, encode_row, kept_positions, to_item
from utils.disk import free_bytes, locked
from utils.errors import UserError
from utils.manifest import read_answers, write_json_atomic
from utils.prepare import Prepared, settings, train_pairs
from utils.shards import ShardWriter, planned_shards

log = logging.getLogger(__name__)


def open_writer(prepared: Prepared) -> ShardWriter:
    """The run's folder, checked against what is there already; nothing is changed yet."""
    request = prepared.request
    output = Path(request.output_path)
    if output.exists() and not (request.resume or request.overwrite):
        raise UserError(
            f"{output} exists: continue its run with --resume, replace it with --overwrite, or "
            "choose another path"
        )
    facts = {
        "arguments": request.arguments,
        "versions": _versions(),
        "devices": [str(device) for device in jax.devices()],
        "mesh_shape": [1, 1],
        "processes": jax.process_count(),
        "train_pairs": train_pairs(prepared),
    }
    writer = ShardWriter(
        prepared.run_folder,
        settings(prepared),
        facts,
        activation_dtype=request.activation_dtype,
        save_every_n_samples=request.save_every_n_samples,
        max_shard_mb=request.max_shard_mb,
        resume=request.resume,
        overwrite=request.overwrite,
    )
    if output.exists() and request.resume and not writer.continues:
        raise UserError(
            f"{output} exists, but there is no run to resume in {prepared.run_folder}: choose "
            "another --output_path, or replace it with --overwrite"
        )
    return writer


def run(prepared: Prepared, signals: Signals) -> dict[str, Any]:
    """Computes and stores what is not there yet, then writes `output_path`.

    Returns the finished manifest. Raises UserError (exit code 1 from the first write on) and
    Interrupted; in both cases what was committed stays, and `--resume` does the rest.
    """
    request = prepared.request
    output, folder = Path(request.output_path), prepared.run_folder
    writer = open_writer(prepared)
    check_disk(prepared, writer.done)
    if writer.complete and output.exists():
        log.info("the run in %s is complete; there is nothing to do", folder)
        return {}
    todo = _without_done(prepared, writer)
    pool = ThreadPoolExecutor(1, "compute")
    started = False
    try:
        computation = pool.submit(Computation, prepared).result() if todo else None
        with locked(folder):
            with signals.shielded():
                writer.set_skipped(prepared.skipped)
                writer.start()
                started = True
                if request.overwrite:
                    output.unlink(missing_ok=True)
            _run_batches(prepared, todo, computation, pool, writer, signals)
            with signals.shielded():
                return _finish(prepared, writer)
    except BaseException as error:
        if started:
            with contextlib.suppress(UserError), signals.shielded():
                writer.close_shard()  # a disk that failed says so again
            log.info("%d samples are stored; --resume does the rest", len(writer.done))
        if isinstance(error, UserError) and started:
            error.exit_code = 1
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                "the device ran out of memory: --resume with a lower --batch_size, or start again "
                "(--overwrite) with a lower --max_model_len or --max_output_tokens",
                exit_code=1,
            ) from error
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_done(prepared: Prepared, writer: ShardWriter) -> list[Batch]:
    """The batches with a row still to do; the shapes stay, rows that are done become padding."""
    todo = []
    for batch in prepared.batches:
        rows = tuple(
            i if i >= 0 and prepared.samples[i].key not in writer.done else -1 for i in batch.rows
        )
        if max(rows) >= 0:
            todo.append(Batch(batch.bucket, rows))
    return todo


def _run_batches(
    prepared: Prepared,
    todo: Sequence[Batch],
    computation: Computation | None,
    pool: ThreadPoolExecutor,
    writer: ShardWriter,
    signals: Signals,
) -> None:
    bar = tqdm(
        total=len(prepared.samples), initial=len(writer.done), unit="sample", desc="inference"
    )
    waiting: collections.deque[Future[tuple[list[Row], Timing]]] = collections.deque()

    def store() -> None:
        rows, timing = waiting.popleft().result()
        with signals.shielded():
            writer.update_timing(*timing)
            for row in rows:
                writer.add(*to_item(row, prepared))
            bar.update(len(rows))
            bar.set_postfix_str(f"{timing.tokens / timing.seconds:.0f} tokens/s")

    with bar:
        for batch in todo:
            waiting.append(pool.submit(computation, batch))
            if len(waiting) > 1:  # the next one computes while this one is stored
                store()
        while waiting:
            store()


def _finish(prepared: Prepared, writer: ShardWriter) -> dict[str, Any]:
    request = prepared.request
    writer.close_shard()
    answers = read_answers(prepared.run_folder)
    targets = {task.task_id: [pair.output for pair in task.test] for task in prepared.tasks}
    predictions = scoring.predictions(targets, answers, generated=request.generates)
    scores = scoring.accuracy(predictions)
    write_json_atomic(request.output_path, predictions)
    manifest = writer.finish({"scores": scores} if request.generates else None)
    if request.activations_dir is None:
        # The manifest stays, for --resume to compare with; what it listed served its purpose.
        write_json_atomic(prepared.run_folder / "metadata.json", {**manifest, "files": []})
        for name in (*(entry["filename"] for entry in manifest["files"]), "answers.jsonl"):
            (prepared.run_folder / name).unlink()
    return manifest


def planned_items(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Items as the run will store them, in order, arrays zero: exact sizes unless it generates.

    A generated answer is taken at its longest, and as the largest grid that it could hold.
    """
    request, config = prepared.request, prepared.config
    for batch in prepared.batches:
        for i in (i for i in batch.rows if i >= 0):
            row = encode_row(prepared, prepared.samples[i])
            if request.generates:
                row.answers = [np.zeros(request.max_output_tokens, np.int32)]
            P, A = len(row.prompt_ids), sum(len(answer) for answer in row.answers)
            row.logprobs = [np.zeros(A, np.float32)] * len(row.answers)
            kept = len(kept_positions(prepared.capture.positions, P, P + A))
            zeros = np.zeros((kept, config.hidden_size), request.activation_dtype)
            row.captures = dict.fromkeys(prepared.capture.names, zeros)
            if not request.no_logits:
                row.logits = np.zeros((1, config.vocab_size), request.activation_dtype)
            item = to_item(row, prepared)[0]
            if request.generates:
                cells = min(A, MAX_SIDE**2)
                item["cells"] = np.concatenate([item["cells"], np.zeros((cells, 7), np.int32)])
                item["prediction"] = [[0] * MAX_SIDE] * -(-cells // MAX_SIDE)
            yield item


def plan_storage(prepared: Prepared) -> tuple[int, list[tuple[int, int]]]:
    """Total tokens, and (samples, bytes) of each shard; see `planned_items`."""
    total = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal total
        for item in tqdm(planned_items(prepared), total=len(prepared.samples), desc="planning"):
            total += len(item["input_ids"])
            yield item

    request = prepared.request
    shards = planned_shards(
        counted(), request.activation_dtype, request.save_every_n_samples, request.max_shard_mb
    )
    shards = list(shards)
    return total, shards


def check_disk(prepared: Prepared, done: set[tuple[str, int]]) -> None:
    """Raises UserError when even answers of one token would not fit on the disk."""
    request, need = prepared.request, 0
    item_size = np.dtype(request.activation_dtype).itemsize
    for sample in prepared.samples:
        if sample.key not in done:
            length = sample.length.total
            kept = kept_positions(prepared.capture.positions, sample.length.prompt, length)
            values = len(kept) * prepared.config.hidden_size * len(prepared.capture.names)
            if prepared.capture.names and not request.no_logits:
                values += prepared.config.vocab_size
            need += values * item_size
    if need > (free := free_bytes(prepared.run_folder)):
        raise UserError(
            f"{prepared.run_folder} needs at least {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB "
            "free: free space, or take fewer layers, --token_positions or tasks"
        )


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
